"""Limits on request bodies: on the length of each, on its encoding and time, and on all bytes held at once, in all and by client.

Used by one event loop.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import anyio
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.caller import Caller
from server.schemas.errors import error_reply, kind_of
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


CLOSE = {"Connection": "close"}
PLAIN = {b"content-encoding": ("Content-Encoding", "identity"), b"transfer-encoding": ("Transfer-Encoding", "chunked")}
"""How headers are called and what they may say of a body that is sent as it is."""
MAX_SHOWN = 64
BYTES_PER_S = 128 * 1024
"""What a slow line brings. A second more for so many bytes: who sends less holds a connection hardly longer."""


class BodyLimit:
    """Answers 413 to a body of more than `max_bytes` bytes, and never holds more than that of it.

    It answers 408 where nothing of a body comes for `max_s` seconds, or it takes more than these and a second for each
    `BYTES_PER_S`. A coding, which would be read as if it were none, is 400.

    `uploads` has the limits of routes that take uploads, by method and path. All others take room in `bodies` as they come, and
    give it back when their requests end: 503 where there is none, 429 where their client has used up its own.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, max_s: float, uploads: Mapping[tuple[str, str], int], bodies: Bodies
    ) -> None:
        self._app, self._max_bytes, self._max_s = app, max_bytes, max_s
        self._uploads, self._bodies = uploads, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting what it sends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = (scope["method"], scope["path"])
        max_bytes, flag = self._max_bytes, "--max-body-bytes"
        if route in self._uploads:
            max_bytes, flag = self._uploads[route], "--max-upload-bytes"
        said = f"the body is longer than {max_bytes} bytes ({flag})"
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if int(told) > max_bytes:
            await _refusal(413, said)(scope, receive, send)
            return
        if fault := _coding_fault(scope["headers"]):
            await _refusal(400, fault)(scope, receive, send)
            return
        held = None if route in self._uploads else Held(self._bodies, client_of(scope))
        if held and (no_room := held.refusal(int(told))):
            await _refusal(no_room.status, no_room.message, no_room.headers)(scope, receive, send)
            return
        num_bytes = 0
        is_coming = True
        end = anyio.current_time() + self._max_s

        async def counted() -> Message:
            nonlocal num_bytes, is_coming
            message = await self._in_time(receive, end + num_bytes / BYTES_PER_S) if is_coming else await receive()
            is_coming = message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_bytes:
                raise HTTPException(413, said, CLOSE)
            if held and (no_room := held.grow(len(message.get("body", b"")))):
                raise HTTPException(no_room.status, no_room.message, CLOSE | no_room.headers)
            return message

        try:
            state = {**scope.get("state", {}), HELD: held} if held else scope.get("state", {})
            await self._app({**scope, "state": state}, counted, send)
        finally:
            if held:
                held.release()

    async def _in_time(self, receive: Receive, end: float) -> Message:
        with anyio.CancelScope(deadline=min(end, anyio.current_time() + self._max_s)):
            return await receive()
        allowed = f"{self._max_s:g} s (--max-body-s) and a second for each {BYTES_PER_S} bytes"
        raise HTTPException(408, f"the body did not come whole within {allowed}", CLOSE)


def _refusal(status: int, said: str, headers: Mapping[str, str] = MappingProxyType({})) -> JSONResponse:
    return JSONResponse(error_reply(status, kind_of(status), said, None), status, {**CLOSE, **headers})


def _coding_fault(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    # A header may come several times, which means a list.
    for name, (called, plain) in PLAIN.items():
        found = b", ".join(value for header, value in headers if header == name).decode("latin-1").strip()
        if found and found.lower() != plain:
            return f"{called} is {found[:MAX_SHOWN]!r}, expected {plain} or none"
    return None
