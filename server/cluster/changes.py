"""Changes that all replicas hear, each in its turn, and replicas that join: between changes, so that they miss none. No Ray."""

import logging
from asyncio import Task, create_task, shield
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import Context
from typing import Any, TypeVar

import anyio

logger = logging.getLogger(__name__)
Made = TypeVar("Made")
TURN_S = 60.0
"""How long a change waits for those before it: one that hangs is not to keep all others from beginning."""


class Changes:
    """Lets one change run, or one join.

    Two changes of a name that ran together would reach the replicas in different orders, which would differ from then on.
    """

    def __init__(self) -> None:
        self._turn, self._first = anyio.Lock(), anyio.Lock()
        self._num_running, self._has_ended = 0, anyio.Event()
        self._under_way = set[Task[Any]]()

    async def make(self, change: Callable[[], Awaitable[Made]]) -> Made:
        """Return what `change` does, in its turn; it goes on when the caller is cancelled."""

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
        """The block is a change: waits until it is its turn, for `TURN_S` at most, and until nobody joins."""
        async with AsyncExitStack() as held:
            with anyio.move_on_after(TURN_S) as waiting:
                await held.enter_async_context(self._turn)
            if waiting.cancelled_caught:
                logger.warning("a change begins beside another one, for which it has waited %g s: replicas may differ", TURN_S)
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
