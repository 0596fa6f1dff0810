"""Limits on request bodies: on the length, encoding and time of each, and on all bytes held at once, in total and by client.

Used by one event loop.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import anyio
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.schemas.errors import error_reply, kind_of
from server.transport.strict_json import MAX_VALUES

FLAG = "--max-bodies-mib"
FREE_BYTES = 16 * 1024
"""Bytes of each body that do not count: short requests are accepted however many long ones there are."""
PARSED_BYTES = 48
"""Memory of one parsed value: a number, and its place in two lists. Counted for up to `MAX_VALUES` values."""
HELD_KEY = "held_body"
"""The key of a request's `HeldBody` in the ASGI state."""
CLIENT_SHARE = 0.5
"""The share of all bytes that one client may hold. Clients behind a proxy that does not identify them count as one."""


@dataclass(frozen=True, slots=True)
class NoRoom:
    """The reason why a body may not grow. `status` is 429 if its client holds too much, 503 if all clients do."""

    status: int
    message: str

    @property
    def headers(self) -> dict[str, str]:
        """The headers that its answer needs."""
        return {"Retry-After": "1"}


def max_counted_bytes(max_body_bytes: int) -> int:
    """Return the most bytes that a body of at most `max_body_bytes` counts for, with the values in it."""
    return max_body_bytes + PARSED_BYTES * min(max_body_bytes, MAX_VALUES)


class Bodies:
    """Budget for the bytes of all bodies. Counts bytes as they come, so announced bytes take no room from others."""

    def __init__(self, max_bytes: int, max_body_bytes: int) -> None:
        """`max_body_bytes` is the most that one body may count for, see `max_counted_bytes`.

        Each client may always hold that much.
        """
        self._max_bytes = max_bytes
        self._max_of_client = max(int(CLIENT_SHARE * max_bytes), max_body_bytes)
        self._by_client: Counter[str] = Counter()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Counted bytes that are held now."""
        return self._num_bytes

    def take(self, client: str, num_bytes: int) -> NoRoom | None:
        """Count `num_bytes` more for a client. If there is no room, count none and return the reason."""
        if refusal := self.refusal(client, num_bytes):
            return refusal
        self._num_bytes += num_bytes
        self._by_client[client] += num_bytes
        return None

    def refusal(self, client: str, num_bytes: int) -> NoRoom | None:
        """Return the reason why a client has no room for `num_bytes` more; None if it has."""
        if num_bytes <= 0:
            return None
        if self._by_client[client] + num_bytes > self._max_of_client:
            held = f"bodies of {self._by_client[client]} bytes of yours are under way, and may have {self._max_of_client}"
            return NoRoom(429, f"{held}, a client's share of {FLAG}; try again")
        if self._num_bytes + num_bytes > self._max_bytes:
            held = f"bodies of {self._num_bytes} bytes are under way, and may have {self._max_bytes}"
            return NoRoom(503, f"{held} ({FLAG}); try again")
        return None

    def release(self, client: str, num_bytes: int) -> None:
        """Release bytes that `take` counted."""
        self._num_bytes -= num_bytes
        self._by_client[client] -= num_bytes
        if not self._by_client[client]:
            del self._by_client[client]


class HeldBody:
    """The bytes of one body in `Bodies`, without the first `FREE_BYTES`."""

    def __init__(self, bodies: Bodies, client: str) -> None:
        self._bodies, self._client = bodies, client
        self._num_bytes = 0
        self._num_taken = 0

    def refusal(self, num_bytes: int) -> NoRoom | None:
        """Return the reason why there is no room for a body of `num_bytes` in all; None if there is. Takes nothing."""
        return self._bodies.refusal(self._client, num_bytes - FREE_BYTES - self._num_taken)

    def grow(self, num_bytes: int) -> NoRoom | None:
        """Take room for `num_bytes` more, or return the reason why there is none."""
        self._num_bytes += num_bytes
        num_more = self._num_bytes - FREE_BYTES - self._num_taken
        if num_more <= 0:
            return None
        if refusal := self._bodies.take(self._client, num_more):
            return refusal
        self._num_taken += num_more
        return None

    def release(self) -> None:
        """Release all bytes."""
        if self._num_taken:
            self._bodies.release(self._client, self._num_taken)
            self._num_taken = 0


CLOSE = {"Connection": "close"}
PLAIN = {b"content-encoding": ("Content-Encoding", "identity"), b"transfer-encoding": ("Transfer-Encoding", "chunked")}
"""Names of headers, and the only value that each may have: bodies are not encoded."""
MAX_SHOWN = 64
BYTES_PER_S = 128 * 1024
"""The rate of a slow line. A body gets a second more for each so many bytes; sending less hardly holds a connection longer."""


class BodyLimit:
    """Middleware that answers 413 to a body of more than `max_bytes` bytes, and never holds more than that of it.

    It answers 408 if nothing of a body comes for `max_s` seconds, or if the body takes longer than `max_s` plus a second for each
    `BYTES_PER_S`. It answers 400 to an encoded body, which would be read as if it were not encoded.

    `uploads` has the limits of routes that take uploads, by method and path. All other bodies take room in `bodies` as they come,
    and release it when their requests end: 503 if there is none, 429 if their client has used up its share. `client_of` returns
    the client that a request's body counts for.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        max_s: float,
        uploads: Mapping[tuple[str, str], int],
        bodies: Bodies,
        client_of: Callable[[Scope], str],
    ) -> None:
        self._app, self._max_bytes, self._max_s = app, max_bytes, max_s
        self._uploads, self._bodies, self._client_of = uploads, bodies, client_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count the bytes of its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = (scope["method"], scope["path"])
        max_bytes, flag = self._max_bytes, "--max-body-bytes"
        if route in self._uploads:
            max_bytes, flag = self._uploads[route], "--max-upload-bytes"
        too_long = f"the body is longer than {max_bytes} bytes ({flag})"
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if int(announced) > max_bytes:
            await _refusal(413, too_long)(scope, receive, send)
            return
        if fault := _coding_fault(scope["headers"]):
            await _refusal(400, fault)(scope, receive, send)
            return
        held = None if route in self._uploads else HeldBody(self._bodies, self._client_of(scope))
        if held and (no_room := held.refusal(int(announced))):
            await _refusal(no_room.status, no_room.message, no_room.headers)(scope, receive, send)
            return
        num_bytes = 0
        is_coming = True
        end = anyio.current_time() + self._max_s

        async def counted() -> Message:
            nonlocal num_bytes, is_coming
            message = await self._receive_in_time(receive, end + num_bytes / BYTES_PER_S) if is_coming else await receive()
            is_coming = message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_bytes:
                raise HTTPException(413, too_long, CLOSE)
            if held and (no_room := held.grow(len(message.get("body", b"")))):
                raise HTTPException(no_room.status, no_room.message, CLOSE | no_room.headers)
            return message

        try:
            state = {**scope.get("state", {}), HELD_KEY: held} if held else scope.get("state", {})
            await self._app({**scope, "state": state}, counted, send)
        finally:
            if held:
                held.release()

    async def _receive_in_time(self, receive: Receive, end: float) -> Message:
        with anyio.CancelScope(deadline=min(end, anyio.current_time() + self._max_s)):
            return await receive()
        allowed = f"{self._max_s:g} s (--max-body-s) and a second for each {BYTES_PER_S} bytes"
        raise HTTPException(408, f"the body did not come whole within {allowed}", CLOSE)


def _refusal(status: int, message: str, headers: Mapping[str, str] = MappingProxyType({})) -> JSONResponse:
    return JSONResponse(error_reply(status, kind_of(status), message, None), status, {**CLOSE, **headers})


def _coding_fault(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    # Repeated headers are equivalent to a list.
    for name, (title, plain) in PLAIN.items():
        encoding = b", ".join(value for header, value in headers if header == name).decode("latin-1").strip()
        if encoding and encoding.lower() != plain:
            return f"{title} is {encoding[:MAX_SHOWN]!r}, expected {plain} or none"
    return None
