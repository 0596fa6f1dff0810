"""Bytes of request bodies that are held at once: a bound on all of them together, and one on each client's share.

Used by one event loop. Knows no HTTP: `BodyLimit` counts and answers.
"""

from collections import Counter
from dataclasses import dataclass

from starlette.types import Scope

from server.access.caller import Caller
from server.transport.strict_json import MAX_VALUES

FLAG = "--max-bodies-mib"
FREE_BYTES = 16 * 1024
"""Of each body, which count for nothing: short requests are taken however many long ones there are."""
PARSED_BYTES = 48
"""Memory of one parsed value: a number, and its place in two lists. Counted for up to `MAX_VALUES` values."""
HELD = "held_body"
"""The key of a request's `Held` in the ASGI state."""
SHARE = 0.5
"""Of all bytes, which one client may hold: behind a proxy that does not name its clients, all of them are one."""


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Why a body may not grow: `status` is 429 where its client holds too much, 503 where all do."""

    status: int
    message: str

    @property
    def headers(self) -> dict[str, str]:
        """Those that its answer needs."""
        return {"Retry-After": "1"}


def most_held(max_body_bytes: int) -> int:
    """Return the most bytes that a body of at most `max_body_bytes` counts for, with the values in it."""
    return max_body_bytes + PARSED_BYTES * min(max_body_bytes, MAX_VALUES)


class Bodies:
    """Counts bytes as they come, so that what a client only announces takes no room from others."""

    def __init__(self, max_bytes: int, max_body_bytes: int) -> None:
        """Take the most bytes of all bodies, and what one may count for, see `most_held`: so much a client may always hold."""
        self._max_bytes = max_bytes
        self._max_of_client = max(int(SHARE * max_bytes), max_body_bytes)
        self._by_client: Counter[str] = Counter()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that are held and count."""
        return self._num_bytes

    def take(self, client: str, num_bytes: int) -> NoRoom | None:
        """Count `num_bytes` more of a client's body; or return why there is no room for them, and count none."""
        if refusal := self.refusal(client, num_bytes):
            return refusal
        self._num_bytes += num_bytes
        self._by_client[client] += num_bytes
        return None

    def refusal(self, client: str, num_bytes: int) -> NoRoom | None:
        """Return why there is no room for so many bytes more of a client; None where there is."""
        if num_bytes <= 0:
            return None
        if self._by_client[client] + num_bytes > self._max_of_client:
            held = f"bodies of {self._by_client[client]} bytes of yours are under way, and may have {self._max_of_client}"
            return NoRoom(429, f"{held}, a client's share of {FLAG}; try again")
        if self._num_bytes + num_bytes > self._max_bytes:
            held = f"bodies of {self._num_bytes} bytes are under way, and may have {self._max_bytes}"
            return NoRoom(503, f"{held} ({FLAG}); try again")
        return None

    def give_back(self, client: str, num_bytes: int) -> None:
        """Count bytes no more that `take` counted."""
        self._num_bytes -= num_bytes
        self._by_client[client] -= num_bytes
        if not self._by_client[client]:
            del self._by_client[client]


def client_of(scope: Scope) -> str:
    """Return the client that a request's body counts for: its tenant, or its address if it has none."""
    caller = scope.get("state", {}).get("caller")
    if isinstance(caller, Caller) and caller.tenant:
        return f"tenant {caller.tenant}"
    return f"address {scope['client'][0] if scope.get('client') else ''}"


class Held:
    """One body's bytes in `Bodies`, but for the first `FREE_BYTES`."""

    def __init__(self, bodies: Bodies, client: str) -> None:
        self._bodies, self._client = bodies, client
        self._num_bytes = 0
        self._num_taken = 0

    def refusal(self, num_bytes: int) -> NoRoom | None:
        """Return why there would be no room if the body had `num_bytes` in all; None where there is. Takes nothing."""
        return self._bodies.refusal(self._client, num_bytes - FREE_BYTES - self._num_taken)

    def grow(self, num_bytes: int) -> NoRoom | None:
        """Take room for `num_bytes` more, or return why there is none."""
        self._num_bytes += num_bytes
        num_more = self._num_bytes - FREE_BYTES - self._num_taken
        if num_more <= 0:
            return None
        if refusal := self._bodies.take(self._client, num_more):
            return refusal
        self._num_taken += num_more
        return None

    def release(self) -> None:
        """Give all of it back."""
        if self._num_taken:
            self._bodies.give_back(self._client, self._num_taken)
            self._num_taken = 0
