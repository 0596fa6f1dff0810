"""Changes that all replicas hear, and replicas that join: each joins between changes, so that it misses none. Knows no Ray."""

from asyncio import Task, create_task, shield
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Any, TypeVar

import anyio

Made = TypeVar("Made")


class Changes:
    """Lets any number of changes run together, or one join alone."""

    def __init__(self) -> None:
        self._first = anyio.Lock()
        self._num_running, self._has_ended = 0, anyio.Event()
        self._under_way = set[Task[Any]]()

    async def make(self, change: Callable[[], Awaitable[Made]]) -> Made:
        """Returns what `change` does, when nobody joins; it goes on when the caller is cancelled."""

        async def run() -> Made:
            async with self.running():
                return await change()

        # Ray cancels the request of a client that leaves, and by its context the calls that it made; but a replica goes on, and
        # one that joined before it is done would not know of the change.
        task = create_task(run(), context=Context())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await shield(task)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The block is a change: waits until nobody joins."""
        async with self._first:
            self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
            self._has_ended.set()

    @asynccontextmanager
    async def paused(self, wait_s: float) -> AsyncIterator[None]:
        """In the block no change runs: waits until those that run have ended, and lets no other begin.

        Raises `TimeoutError` where they take more than `wait_s`: one that hangs is not to keep all others from beginning.
        """
        async with self._first:
            with anyio.move_on_after(wait_s) as waiting:
                while self._num_running:
                    self._has_ended = anyio.Event()
                    await self._has_ended.wait()
            if waiting.cancelled_caught:
                raise TimeoutError(f"a change has been under way for more than {wait_s:g} s")
            yield
