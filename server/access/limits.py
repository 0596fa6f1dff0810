"""Limits of a tenant: requests a minute, answers under way at once, places in a queue.

Counted in this process. Use from the event loop alone.
"""

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.access.caller import Caller


class TenantPlaces:
    """Counts of the queue places that each tenant holds.

    Use from the event loop alone. Clients without a key are one tenant, "".
    """

    def __init__(self) -> None:
        self._num_held: Counter[str] = Counter()

    def num_held(self, tenant: str) -> int:
        """Return the number of places that the tenant holds."""
        return self._num_held[tenant]

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Hold one more place for the tenant until the block ends."""
        self._num_held[tenant] += 1
        try:
            yield
        finally:
            self._num_held[tenant] -= 1
            self._num_held += Counter()  # drops the tenants at zero


MINUTE_S = 60


class RateLimitedError(Exception):
    """A tenant exceeds a limit. It may try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class RateLimiter:
    """Sliding window over the last minute's requests of each tenant that has `requests_per_minute`.

    Each of several ingresses in front of a cluster counts for itself. It allows its share of the limit, rounded up.
    """

    def __init__(self, num_ingresses: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_ingresses, self._clock = num_ingresses, clock
        self._sent: OrderedDict[str, deque[float]] = OrderedDict()
        """Times of each tenant's requests in the last minute. The tenant that has been silent for longest comes first."""

    def limit(self, caller: Caller) -> int | None:
        """Return the requests a minute that this process allows the caller's tenant; None for no limit."""
        if caller.requests_per_minute is None:
            return None
        return math.ceil(caller.requests_per_minute / self._num_ingresses)

    def count(self, caller: Caller, num_requests: int = 1) -> None:
        """Count requests of the caller's tenant, at most `limit` in a minute. Amortised constant time.

        Raises `RateLimitedError`, and counts none of them, if they exceed the limit.
        """
        limit = self.limit(caller)
        if limit is None or not num_requests:
            return
        assert num_requests <= limit
        now = self._clock()
        while self._sent and next(iter(self._sent.values()))[-1] < now - MINUTE_S:
            self._sent.popitem(last=False)
        times = self._sent.get(caller.tenant, deque())
        while times and times[0] < now - MINUTE_S:
            times.popleft()
        if (num_excess := len(times) + num_requests - limit) > 0:
            # There is room again once that many of the oldest requests are a minute old.
            raise self._error(caller.tenant, limit, times[num_excess - 1] + MINUTE_S - now)
        times.extend([now] * num_requests)
        self._sent[caller.tenant] = times
        self._sent.move_to_end(caller.tenant)

    def _error(self, tenant: str, limit: int, wait_s: float) -> RateLimitedError:
        retry_after_s = max(math.ceil(wait_s), 1)
        suffix = f" by each of {self._num_ingresses} ingresses" if self._num_ingresses > 1 else ""
        message = (
            f"tenant {tenant!r} may send {limit} requests a minute{suffix}, and has sent them; try again in {retry_after_s} s"
        )
        return RateLimitedError(message, retry_after_s)


class Limiter:
    """Counts of the answers that each tenant has under way."""

    def __init__(self) -> None:
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def places(self, caller: Caller, num_answers: int = 1) -> Iterator[None]:
        """Hold places for answers of the caller's tenant until the block ends. Raises `RateLimitedError` if there are not enough.

        The limit counts answers; one request may ask for several.
        """
        number = self._under_way[caller.tenant]
        if caller.max_requests is not None and number + num_answers > caller.max_requests:
            message = f"tenant {caller.tenant!r} has {number} answers under way, and may have {caller.max_requests}; try again"
            raise RateLimitedError(message, 1)
        self._under_way[caller.tenant] += num_answers
        try:
            yield
        finally:
            self._under_way[caller.tenant] -= num_answers
            self._under_way += Counter()  # drops the tenants at zero

    def num_under_way(self, caller: Caller) -> int:
        """Return the number of places that the caller's tenant holds."""
        return self._under_way[caller.tenant]
