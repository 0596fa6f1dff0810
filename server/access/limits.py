"""Limits of a tenant: requests a minute, answers under way at once, places in a line. Counted in this process, by its event loop
alone.
"""

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.access.caller import Caller


class TenantPlaces:
    """The places that tenants hold; use from the event loop alone. Clients without a key are one tenant, called ""."""

    def __init__(self) -> None:
        self._num_held: Counter[str] = Counter()

    def num_held(self, tenant: str) -> int:
        """Return how many places a tenant holds."""
        return self._num_held[tenant]

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Hold one more place of a tenant until the block ends."""
        self._num_held[tenant] += 1
        try:
            yield
        finally:
            self._num_held[tenant] -= 1
            self._num_held += Counter()  # forgets the tenants that hold none


MINUTE_S = 60


class RateLimitedError(Exception):
    """A tenant asks for more than it may; after `retry_after_s` it may ask again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class RateLimiter:
    """The requests of the last minute of each tenant that has `requests_per_minute`.

    Of several ingresses in front of a cluster each counts for itself, and allows its share of the limit, rounded up.
    """

    def __init__(self, num_ingresses: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_ingresses, self._clock = num_ingresses, clock
        self._sent: OrderedDict[str, deque[float]] = OrderedDict()
        """When each tenant sent its requests of the last minute; first the tenant that has been silent for longest."""

    def limit(self, caller: Caller) -> int | None:
        """Return the requests a minute that this process allows the caller's tenant; None: any number."""
        if caller.requests_per_minute is None:
            return None
        return math.ceil(caller.requests_per_minute / self._num_ingresses)

    def count(self, caller: Caller, num_requests: int = 1) -> None:
        """Count requests of the caller's tenant, no more than `limit` allows in a minute. Takes constant time, amortised.

        Raises `RateLimitedError`, and counts none of them, where they exceed the limit.
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
            # Once so many of the oldest are a minute old, there is room.
            raise self._error(caller.tenant, limit, times[num_excess - 1] + MINUTE_S - now)
        times.extend([now] * num_requests)
        self._sent[caller.tenant] = times
        self._sent.move_to_end(caller.tenant)

    def _error(self, tenant: str, limit: int, wait_s: float) -> RateLimitedError:
        retry_after_s = max(math.ceil(wait_s), 1)
        each = f" by each of {self._num_ingresses} ingresses" if self._num_ingresses > 1 else ""
        message = f"tenant {tenant!r} may send {limit} requests a minute{each}, and has sent them; try again in {retry_after_s} s"
        return RateLimitedError(message, retry_after_s)


class Limiter:
    """The answers under way of each tenant."""

    def __init__(self) -> None:
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def places(self, caller: Caller, num_answers: int = 1) -> Iterator[None]:
        """Hold places of the caller's tenant until the block ends. Raises `RateLimitedError` where there are not so many.

        What is under way are answers, of which a request may want several.
        """
        number = self._under_way[caller.tenant]
        if caller.max_requests is not None and number + num_answers > caller.max_requests:
            said = f"tenant {caller.tenant!r} has {number} answers under way, and may have {caller.max_requests}; try again"
            raise RateLimitedError(said, 1)
        self._under_way[caller.tenant] += num_answers
        try:
            yield
        finally:
            self._under_way[caller.tenant] -= num_answers
            self._under_way += Counter()  # forgets those that have none

    def num_under_way(self, caller: Caller) -> int:
        """Return how many places the caller's tenant holds."""
        return self._under_way[caller.tenant]
