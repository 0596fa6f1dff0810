"""Refuses bodies that are too long, by their header where it says so, else as they come."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.schemas.errors import error_reply


class BodyLimit:
    """Answers 413 to a body of more than `max_bytes` bytes, and never holds more than that of it.

    `others` has the limits of single routes, by method and path.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, others: Mapping[tuple[str, str], int]) -> None:
        self._app, self._max_bytes, self._others = app, max_bytes, others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, counting what it sends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._others.get((scope["method"], scope["path"]), self._max_bytes)
        said = f"the body is longer than {max_bytes} bytes"
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if int(told) > max_bytes:
            reply = JSONResponse(error_reply(413, "BadRequestError", said, None), 413, {"Connection": "close"})
            await reply(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_bytes:
                raise HTTPException(413, said, {"Connection": "close"})
            return message

        await self._app(scope, counted, send)
