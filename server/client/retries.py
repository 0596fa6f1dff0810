"""Which failures of a call are followed by another attempt, and when.

Only what is safe: nothing was sent, or the call may be made twice and the server did not answer, or the server says when to come
again. A stream has begun with its first event: the head of a good reply comes while the request still waits for its turn.
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
"""What says when to come again. Of several replicas one may say 503 after another has done what was asked; 429 comes before."""
NOBODY_BEHIND = (500, 502, 503, 504)
"""What a gateway says, in its own words, where the server behind it did not answer: 500 if it is Ray's, which has no other."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How often, and how long a client waits for it."""

    number: int
    longest_s: float
    """A server that asks for more patience is not asked again."""


@dataclass(slots=True)
class Attempts:
    """Those of one call."""

    retries: Retries
    is_repeatable: bool
    """The call may be made twice: the second time changes nothing more."""
    num_failed: int = 0

    def wait_after_failure(self, error: httpx.RequestError) -> float:
        """Return how long to wait for the next attempt, in seconds. Raises what `error` means, where there is none."""
        is_safe = isinstance(error, NOT_SENT) or (self.is_repeatable and isinstance(error, NOT_ANSWERED))
        if not is_safe or not self._has_more():
            raise lost(error) from error
        return self._wait()

    def wait_after_break(self, error: httpx.RequestError, *, has_begun: bool) -> float:
        """Return how long to wait for the next attempt at a stream that broke off after its head, in seconds.

        Raises what `error` means, where there is none, or where an event had come.
        """
        if has_begun:
            raise (SilenceError if isinstance(error, httpx.TimeoutException) else BrokenStreamError)(_said(error)) from error
        return self.wait_after_failure(error)

    def wait_after_refusal(self, error: ApiError) -> float:
        """Return how long to wait for the next attempt, in seconds. Raises `error`, where there is none."""
        is_told = error.status in (COME_AGAIN if self.is_repeatable else NOT_DONE) and error.retry_after is not None
        is_unanswered = error.type == UNKNOWN and error.status in NOBODY_BEHIND and self.is_repeatable
        asked = error.retry_after or 0.0
        if not (is_told or is_unanswered) or asked > self.retries.longest_s or not self._has_more():
            raise error
        # All who were refused at once shall not come back at once.
        return asked + self._wait()

    def _has_more(self) -> bool:
        return self.num_failed < self.retries.number

    def _wait(self) -> float:
        longest = min(MAX_WAIT_S, FIRST_WAIT_S * 2**self.num_failed)
        self.num_failed += 1
        return random.uniform(longest / 2, longest)


def lost(error: httpx.RequestError) -> ClientError:
    """Return what the end of a connection, or what was wrong with it, means to a caller."""
    return (SilenceError if isinstance(error, httpx.TimeoutException) else ConnectionFailedError)(_said(error))


def _said(error: httpx.RequestError) -> str:
    return str(error) or type(error).__name__
