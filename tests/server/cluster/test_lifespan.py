"""What is entered in one task and left in another."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from server.cluster.lifespan import Lifespan

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
