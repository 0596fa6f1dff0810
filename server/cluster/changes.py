"""Changes that all replicas hear, and replicas that join: each joins between changes, so that it misses none. Knows no Ray."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio


class Changes:
    """Lets any number of changes run together, or one join alone."""

    def __init__(self) -> None:
        self._first = anyio.Lock()
        self._num_running, self._has_ended = 0, anyio.Event()

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
    async def paused(self) -> AsyncIterator[None]:
        """In the block no change runs: waits until those that run have ended, and lets no other begin."""
        async with self._first:
            while self._num_running:
                self._has_ended = anyio.Event()
                await self._has_ended.wait()
            yield
