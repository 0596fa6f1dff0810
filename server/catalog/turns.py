"""One change of a name at a time, within this process; stores have locks of their own for others."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakValueDictionary

import anyio


class Turns:
    """Names that are being changed."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()  # of names that somebody changes or waits for

    @asynccontextmanager
    async def of(self, *names: str) -> AsyncIterator[None]:
        """Waits until nobody else changes one of these names, and lets nobody else before the block ends."""
        async with AsyncExitStack() as held:
            for name in sorted(set(names)):  # in one order everywhere, or two could wait for each other
                await held.enter_async_context(self._locks.setdefault(name, anyio.Lock()))
            yield
