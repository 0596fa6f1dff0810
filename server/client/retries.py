"""Retries: whether a failed call is repeated, and when.

Only safe retries: nothing was sent, or the call is repeatable and the server did not answer, or the server says when to retry. A
stream begins with its first event, not with its headers: these come while the request still waits.
"""

import random
from dataclasses import dataclass

import httpx

from server.client.errors import UNKNOWN, ApiError, BrokenStreamError, ClientError, ConnectionFailedError, SilenceError

FIRST_WAIT_S = 0.25
MAX_WAIT_S = 8.0
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout)
NOT_ANSWERED = (httpx.NetworkError, httpx.RemoteProtocolError)
NOT_DONE, COME_AGAIN = (429,), (429, 503)
"""Statuses whose reply says when to retry. With several replicas, a 503 may come after another replica has done the call; a 429
comes before."""
GATEWAY_FAILED = (500, 502, 503, 504)
"""Statuses of a gateway whose server did not answer, in the gateway's own words. Ray's gateway always sends 500."""


@dataclass(frozen=True, slots=True)
class Retries:
    """The limits on a client's retries."""

    number: int
    longest_s: float
    """The longest wait in seconds. A server that asks for a longer one is not asked again."""


@dataclass(slots=True)
class Attempts:
    """The attempts of one call."""

    retries: Retries
    is_repeatable: bool
    """Whether the call may be made twice: the second time changes nothing more."""
    num_failed: int = 0

    def wait_after_failure(self, error: httpx.RequestError) -> float:
        """Return the wait before the next attempt, in seconds. Raises the client error for `error` if there is none."""
        is_safe = isinstance(error, NOT_SENT) or (self.is_repeatable and isinstance(error, NOT_ANSWERED))
        if not is_safe or not self._has_more():
            raise lost(error) from error
        return self._wait()

    def wait_after_break(self, error: httpx.RequestError, *, has_begun: bool) -> float:
        """Return the wait before the next attempt at a stream that broke after its headers, in seconds.

        Raises the client error for `error` if there is no next attempt, or if an event had come.
        """
        if has_begun:
            raise (SilenceError if isinstance(error, httpx.TimeoutException) else BrokenStreamError)(_message(error)) from error
        return self.wait_after_failure(error)

    def wait_after_refusal(self, error: ApiError) -> float:
        """Return the wait before the next attempt, in seconds. Raises `error` if there is none."""
        is_announced = error.status in (COME_AGAIN if self.is_repeatable else NOT_DONE) and error.retry_after is not None
        is_unanswered = error.type == UNKNOWN and error.status in GATEWAY_FAILED and self.is_repeatable
        retry_after_s = error.retry_after or 0.0
        if not (is_announced or is_unanswered) or retry_after_s > self.retries.longest_s or not self._has_more():
            raise error
        # Jitter, so that clients that were refused at the same time do not return at the same time.
        return retry_after_s + self._wait()

    def _has_more(self) -> bool:
        return self.num_failed < self.retries.number

    def _wait(self) -> float:
        longest = min(MAX_WAIT_S, FIRST_WAIT_S * 2**self.num_failed)
        self.num_failed += 1
        return random.uniform(longest / 2, longest)


def lost(error: httpx.RequestError) -> ClientError:
    """Return the client error for a failed connection."""
    return (SilenceError if isinstance(error, httpx.TimeoutException) else ConnectionFailedError)(_message(error))


def _message(error: httpx.RequestError) -> str:
    return str(error) or type(error).__name__
