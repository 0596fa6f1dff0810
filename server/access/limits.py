"""What a tenant may ask for in a minute, and at once. Counted in this process; used by its event loop alone."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server.access.caller import Caller

MINUTE_S = 60


class RateLimitedError(Exception):
    """A tenant asks for more than it may; after `retry_after_s` it may ask again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Limiter:
    """Counts the requests of each tenant that has limits."""

    def __init__(self) -> None:
        self._minutes = MovingWindowRateLimiter(MemoryStorage())
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

    def _check(self, caller: Caller, num_requests: int, num_answers: int) -> None:
        number = self._under_way[caller.tenant]
        if caller.max_requests is not None and number + num_answers > caller.max_requests:
            said = f"tenant {caller.tenant!r} has {number} answers under way, and may have {caller.max_requests}; try again"
            raise RateLimitedError(said, 1)
        # Last, for it counts: a request that is refused is none.
        if caller.requests_per_minute is not None:
            self._count(caller.tenant, caller.requests_per_minute, num_requests)

    def _count(self, tenant: str, per_minute: int, count: int) -> None:
        limit = RateLimitItemPerMinute(per_minute)
        if self._minutes.hit(limit, tenant, cost=count):
            return
        left_s = self._minutes.get_window_stats(limit, tenant).reset_time - time.time()
        retry_after_s = min(max(math.ceil(left_s), 1), MINUTE_S)
        said = f"tenant {tenant!r} may send {per_minute} requests a minute, and has sent them; try again in {retry_after_s} s"
        raise RateLimitedError(said, retry_after_s)
