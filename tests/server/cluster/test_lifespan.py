"""What is entered in one task and left in another."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from server.cluster.lifecycle import Lifespan

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_what_anyio_runs_ends_well_though_another_task_ends_it() -> None:
    """Ray starts and ends a replica so: its end raised, and nothing that was to follow was done."""
    said = list[str]()

    @asynccontextmanager
    async def living() -> AsyncIterator[str]:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            yield "state"
            said.append("ended")
            group.cancel_scope.cancel()
        said.append("left")

    lifespan = Lifespan(living())
    assert await asyncio.create_task(lifespan.start()) == "state"
    assert said == []
    await asyncio.create_task(lifespan.end())
    assert said == ["ended", "left"]


@pytest.mark.parametrize("has_started", [False, True])
async def test_what_is_raised_is_heard(has_started: bool) -> None:
    @asynccontextmanager
    async def failing() -> AsyncIterator[None]:
        if has_started:
            yield
        raise ValueError("no")

    lifespan = Lifespan(failing())
    if has_started:
        await lifespan.start()
    with pytest.raises(ValueError, match="no"):
        await (lifespan.end if has_started else lifespan.start)()


async def test_what_is_raised_while_it_runs_is_seen_by_a_check() -> None:
    """A replica went on for ever without the task that watches the key file."""
    may_fail = anyio.Event()

    async def fail() -> None:
        await may_fail.wait()
        raise ValueError("no")

    @asynccontextmanager
    async def living() -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            yield
            group.cancel_scope.cancel()

    lifespan = Lifespan(living())
    await lifespan.start()
    lifespan.check()
    may_fail.set()
    with pytest.raises(ExceptionGroup):
        await lifespan.end()
    with pytest.raises(ExceptionGroup):
        lifespan.check()
