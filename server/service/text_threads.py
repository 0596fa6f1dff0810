"""Worker threads that tokenize and detokenize.

Texts are sorted by length into three lanes (short, medium, long), and a tenant may use only some of a lane's threads.
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
MAX_LONG_THREADS = 4
"""Threads for the long texts of all tenants. A core that tokenizes is one less for the engine."""
MAX_SHORTER_THREADS = 8
"""Threads of the short lane, and of the medium lane."""
MAX_TENANT_THREADS = 4
"""Threads of the short lane, and of the medium lane, that one tenant may use."""
BACKOFF = 3.0
"""After a text is refused, its tenant's next one waits for this many times the time that the text took."""
Result = TypeVar("Result")


class TenantSemaphores:
    """A semaphore for each tenant. Tasks that wait are served in order. Use from one event loop."""

    def __init__(self, num_permits: int) -> None:
        """`num_permits` is the number of tasks of one tenant that may hold the semaphore at a time."""
        self._num_permits = num_permits
        self._by_tenant: WeakValueDictionary[str, Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def acquire(self, tenant: str) -> AsyncIterator[None]:
        """Hold the tenant's semaphore until the block ends."""
        semaphore = self._by_tenant.get(tenant)
        if semaphore is None:
            semaphore = self._by_tenant[tenant] = Semaphore(self._num_permits, fast_acquire=True)
        async with semaphore:
            yield


class _Lane:
    """A lane with threads of its own, for texts of about one size."""

    def __init__(self, num_tenant_threads: int, num_threads: int) -> None:
        self._semaphores, self._threads = TenantSemaphores(num_tenant_threads), CapacityLimiter(num_threads)

    async def run(self, work: Callable[[], Result], tenant: str) -> Result:
        duration = 0.0

        def timed() -> Result:
            nonlocal duration
            began = perf_counter()
            try:
                return work()
            finally:
                duration = perf_counter() - began

        async with self._semaphores.acquire(tenant):
            try:
                return await run_sync(timed, limiter=self._threads)
            except Exception:
                await sleep(BACKOFF * duration)  # refused: a tenant that sends many such texts must leave the core to others
                raise


class TextThreads:
    """Thread pools for work on whole texts, off the event loop."""

    def __init__(self) -> None:
        self._short, self._medium = (_Lane(MAX_TENANT_THREADS, MAX_SHORTER_THREADS) for _ in range(2))
        self._long = _Lane(1, MAX_LONG_THREADS)

    async def run(self, work: Callable[[], Result], tenant: str, size: int) -> Result:
        """Run `work` on a thread of the lane for its texts, and return its result. Raises what `work` raises.

        `size` is the length of all its texts, in characters or tokens: up to `SHORT` is the short lane, up to `LONG` the medium
        one. Waits until the tenant may use one more thread of the lane (one in all in the long lane, `MAX_TENANT_THREADS` in the
        others), then until a thread of the lane is free. So short texts never wait for longer ones. If `work` raises, the call
        first waits for `BACKOFF` times as long as `work` took; until then its thread counts as used by the tenant.
        """
        lane = self._short if size <= SHORT else self._medium if size <= LONG else self._long
        return await lane.run(work, tenant)
