"""Refuses bodies that are too long, by their header where it says so, else as they come; and those that do not come, or are in a
coding."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import anyio
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.schemas.errors import error_reply, kind_of
from server.transport.bodies import HELD, Bodies, Held, client_of

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
        """Passes the request on, counting what it sends."""
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
