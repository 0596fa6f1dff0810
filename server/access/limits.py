"""What a tenant may ask for in a minute, and at once. Counted in this process; used by its event loop alone."""

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.access.caller import Caller

MINUTE_S = 60


class RateLimitedError(Exception):
    """A tenant asks for more than it may; after `retry_after_s` it may ask again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Limiter:
    """Counts the requests of each tenant that has limits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent: OrderedDict[str, deque[float]] = OrderedDict()
        """When each tenant sent its requests of the last minute; first the tenant that has been silent for longest."""
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def places(self, caller: Caller, num_requests: int = 1, num_answers: int | None = None) -> Iterator[None]:
        """Holds places of the caller's tenant until the block ends. Raises `RateLimitedError` where there are not so many.

        What is under way are answers, of which a request may want several, by default one each.
        """
        count = num_requests if num_answers is None else num_answers
        self._check(caller, num_requests, count)
        self._under_way[caller.tenant] += count
        try:
            yield
        finally:
            self._under_way[caller.tenant] -= count
            self._under_way += Counter()  # forgets those that have none

    def num_under_way(self, caller: Caller) -> int:
        """Returns how many places the caller's tenant holds."""
        return self._under_way[caller.tenant]

    def _check(self, caller: Caller, num_requests: int, num_answers: int) -> None:
        number = self._under_way[caller.tenant]
        if caller.max_requests is not None and number + num_answers > caller.max_requests:
            said = f"tenant {caller.tenant!r} has {number} answers under way, and may have {caller.max_requests}; try again"
            raise RateLimitedError(said, 1)
        # Last, for it counts: a request that is refused is none.
        if caller.requests_per_minute is not None:
            self._count(caller.tenant, caller.requests_per_minute, num_requests)

    def _count(self, tenant: str, per_minute: int, count: int) -> None:
        now = self._clock()
        while self._sent and next(iter(self._sent.values()))[-1] < now - MINUTE_S:
            self._sent.popitem(last=False)
        times = self._sent.get(tenant, deque())
        while times and times[0] < now - MINUTE_S:
            times.popleft()
        if len(times) + count > per_minute:
            retry_after_s = max(math.ceil(times[0] + MINUTE_S - now), 1) if times else MINUTE_S
            said = f"tenant {tenant!r} may send {per_minute} requests a minute, and has sent them; try again in {retry_after_s} s"
            raise RateLimitedError(said, retry_after_s)
        times.extend([now] * count)
        self._sent[tenant] = times
        self._sent.move_to_end(tenant)
