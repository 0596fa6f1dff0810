"""Worker threads for what is done with texts: a tenant's texts wait for one another, and few of them for those of others."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, Semaphore
from anyio.to_thread import run_sync

SHORT = 2048
"""Characters, or tokens, of a text that takes less than a thread's turn to tokenize: nearly all requests have less."""
LONG = 16384
"""Characters, or tokens, of a text that takes about 10 ms to tokenize."""
MAX_THREADS = 4
"""For the long texts of all tenants together: a core that tokenizes is one less for the engine."""
MAX_SHORTER = 8
"""Threads for the texts of all tenants together that are not long, and as many for the short ones."""
MAX_OF_TENANT = 4
"""Of these, for one tenant."""
Result = TypeVar("Result")


class TenantTurns:
    """A few turns at a time for each tenant: its others wait for them, in order. Use from one event loop."""

    def __init__(self, num_turns: int) -> None:
        """Take how many turns one tenant may have at a time."""
        self._num_turns = num_turns
        self._by_tenant: WeakValueDictionary[str, Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Give a turn until the block ends; at once where one is free."""
        turns = self._by_tenant.get(tenant)
        if turns is None:
            turns = self._by_tenant[tenant] = Semaphore(self._num_turns, fast_acquire=True)
        async with turns:
            yield


class _Lane:
    """Threads of its own for texts of about one size."""

    def __init__(self, num_of_tenant: int, num_threads: int) -> None:
        self._turns, self._threads = TenantTurns(num_of_tenant), CapacityLimiter(num_threads)

    async def run(self, work: Callable[[], Result], tenant: str) -> Result:
        async with self._turns.turn(tenant):
            return await run_sync(work, limiter=self._threads)


class TextThreads:
    """Runs what is done with whole texts, off the event loop that calls it."""

    def __init__(self) -> None:
        self._short, self._medium = (_Lane(MAX_OF_TENANT, MAX_SHORTER) for _ in range(2))
        self._long = _Lane(1, MAX_THREADS)

    async def run(self, work: Callable[[], Result], tenant: str, size: int) -> Result:
        """Return what `work` returns for texts of `size` characters or tokens in all; raises what it raises.

        It waits until one of its tenant's threads is free, of which there is one for long texts and `MAX_OF_TENANT` for others,
        and then, in turn with the few of other tenants, for one of all. Short texts wait for no longer ones.
        """
        lane = self._short if size <= SHORT else self._medium if size <= LONG else self._long
        return await lane.run(work, tenant)
