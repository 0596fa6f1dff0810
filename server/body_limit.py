"""Refuses bodies that are too long, by their header where it says so, else as they come."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.schemas import error_reply


class _TooLongError(Exception):
    pass


class BodyLimit:
    """Answers 413 to a body of more than `max_bytes` bytes, and never holds more than that of it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_bytes, is_begun = 0, False

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise _TooLongError
            return message

        async def noted(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            if int(dict(scope["headers"]).get(b"content-length", b"0")) > self._max_bytes:
                raise _TooLongError
            await self._app(scope, counted, noted)
        except _TooLongError:
            if is_begun:
                raise
            said = f"the body is longer than {self._max_bytes} bytes"
            await JSONResponse(error_reply(413, "BadRequestError", said, None), 413)(scope, receive, send)
