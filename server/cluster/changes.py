"""Changes that all replicas get, one at a time, and joins of replicas between changes, so that they miss none. Knows no Ray."""

import logging
from asyncio import Task, create_task, shield
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import Context
from typing import Any, TypeVar

import anyio

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
MAX_WAIT_S = 60.0
"""Seconds that a change waits for those before it: one that hangs must not block all others."""


class Changes:
    """Lock that admits one change at a time, or one join.

    Two changes of one name at the same time would reach the replicas in different orders, and the replicas would differ from then
    on.
    """

    def __init__(self) -> None:
        self._change_lock, self._join_lock = anyio.Lock(), anyio.Lock()
        self._num_running, self._has_ended = 0, anyio.Event()
        self._under_way = set[Task[Any]]()

    async def make(self, change: Callable[[], Awaitable[Result]]) -> Result:
        """Run `change` when it is its turn, and return its result. It goes on if the caller is cancelled."""

        async def run() -> Result:
            async with self.running():
                return await change()

        # Ray cancels the request of a client that disconnects, and through the context also the calls that it made. But a replica
        # goes on, and one that joins meanwhile would miss the change.
        task = create_task(run(), context=Context())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await shield(task)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the block as a change: wait for earlier changes, for at most `MAX_WAIT_S`, and until no replica joins."""
        async with AsyncExitStack() as stack:
            with anyio.move_on_after(MAX_WAIT_S) as waiting:
                await stack.enter_async_context(self._change_lock)
            if waiting.cancelled_caught:
                logger.warning(
                    "a change begins beside another one, for which it has waited %g s: replicas may differ", MAX_WAIT_S
                )
            async with self._join_lock:
                self._num_running += 1
            try:
                yield
            finally:
                self._num_running -= 1
                self._has_ended.set()

    @asynccontextmanager
    async def paused(self, wait_s: float) -> AsyncIterator[None]:
        """Run the block without changes: wait until the running ones have ended, and let no other begin.

        Raises `TimeoutError` if they take more than `wait_s`: a change that hangs must not block all others.
        """
        async with self._join_lock:
            with anyio.move_on_after(wait_s) as waiting:
                while self._num_running:
                    self._has_ended = anyio.Event()
                    await self._has_ended.wait()
            if waiting.cancelled_caught:
                raise TimeoutError(f"a change has been under way for more than {wait_s:g} s")
            yield
