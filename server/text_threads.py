"""Worker threads that tokenize and detokenize.

Texts are sorted by length into lanes, and a tenant may use only some of a lane's threads.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, Semaphore, sleep
from anyio.to_thread import run_sync

SHORT = 2048
"""Characters or tokens. A text of up to this length tokenizes in less than the interpreter's thread switch interval."""
LONG = 16384
"""Characters or tokens. Longer texts take more than about 10 ms to tokenize."""
MAX_THREADS = 4
"""For the long texts of all tenants together: a core that tokenizes is one less for the engine."""
MAX_SHORTER = 8
"""Threads of the short lane, and of the medium one."""
MAX_OF_TENANT = 4
"""Of these, for one tenant."""
REST = 3.0
"""After a text that is refused, its tenant's next one waits for this many times what it took."""
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
        took = 0.0

        def timed() -> Result:
            nonlocal took
            began = perf_counter()
            try:
                return work()
            finally:
                took = perf_counter() - began

        async with self._turns.turn(tenant):
            try:
                return await run_sync(timed, limiter=self._threads)
            except Exception:
                await sleep(REST * took)  # refused: whoever sends many such texts leaves the core to others
                raise


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
