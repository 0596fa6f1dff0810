"""A context, such as an application's lifespan, that is entered and left in a task of its own. Knows no Ray.

Ray starts a replica in one of its tasks and ends it in another, and what anyio runs ends only in the task that began it.
"""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

Given = TypeVar("Given")


class Lifespan(Generic[Given]):
    """Runs `context` from `start` to `end`, which any tasks may call, each once."""

    def __init__(self, context: AbstractAsyncContextManager[Given]) -> None:
        self._context = context
        self._is_to_end = asyncio.Event()

    async def start(self) -> Given:
        """Returns what the context gives. Raises what it raises."""
        started: asyncio.Future[Given] = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._run(started))
        either: set[asyncio.Future[Any]] = {started, self._running}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            await self._running
        return await started

    def check(self) -> None:
        """Raise what the context has raised since it was entered, if anything."""
        if self._running.done():
            self._running.result()

    async def end(self) -> None:
        """Leaves the context. Raises what it raises, or has raised since it was entered."""
        self._is_to_end.set()
        await self._running

    async def _run(self, started: asyncio.Future[Given]) -> None:
        async with self._context as given:
            started.set_result(given)
            await self._is_to_end.wait()
