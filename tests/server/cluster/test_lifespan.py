"""Contexts that one task enters and another leaves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from server.cluster.lifecycle import Lifespan

pytestmark = pytest.mark.anyio


async def test_a_context_of_anyio_can_be_ended_by_another_task() -> None:
    """Regression: Ray starts and ends a replica in different tasks; the end raised, and the steps after it were skipped."""
    events = list[str]()

    @asynccontextmanager
    async def living() -> AsyncIterator[str]:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            yield "state"
            events.append("ended")
            group.cancel_scope.cancel()
        events.append("left")

    lifespan = Lifespan(living())
    assert await asyncio.create_task(lifespan.start()) == "state"
    assert events == []
    await asyncio.create_task(lifespan.end())
    assert events == ["ended", "left"]


@pytest.mark.parametrize("has_started", [False, True])
async def test_an_error_at_the_start_or_the_end_is_raised(has_started: bool) -> None:
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


async def test_an_error_of_a_running_context_is_raised_by_a_check() -> None:
    """Regression: a replica went on for ever without the task that watches the key file."""
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
