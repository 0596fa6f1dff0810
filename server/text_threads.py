"""Worker threads for long texts, one for each tenant: a tenant's long texts wait for one another, and nobody else for them."""

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

LONG = 16384
"""Characters, or tokens, of a text that takes about 10 ms to tokenize."""
MAX_THREADS = 4
"""Of all tenants together: a core that tokenizes is one less for the engine."""
Result = TypeVar("Result")


class TextThreads:
    """Runs what is done with whole texts, off the event loop that calls it."""

    def __init__(self) -> None:
        self._all = CapacityLimiter(MAX_THREADS)
        self._by_tenant: WeakValueDictionary[str, CapacityLimiter] = WeakValueDictionary()

    async def run(self, work: Callable[[], Result], tenant: str, size: int) -> Result:
        """Return what `work` returns for texts of `size` characters or tokens in all; raises what it raises.

        Short texts share the threads of everything else. A long one waits until its tenant's one thread is free, and then, in
        turn with other tenants, for one of `MAX_THREADS`.
        """
        if size <= LONG:
            return await run_sync(work)
        limiter = self._by_tenant.setdefault(tenant, CapacityLimiter(1))
        async with limiter:
            return await run_sync(work, limiter=self._all)
