"""A response of server-sent events that holds a request's place, and gives it back however it ends."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

import anyio
from fastapi.sse import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}


class UnreadError(Exception):
    """The client takes nothing."""


class EventStream(EventSourceResponse):
    """Sends `events`, and closes `place` at the end, also where the client has gone before the first.

    A client that takes nothing for `max_unread_s` is left: the server ends its connection.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], place: AsyncExitStack, max_unread_s: float) -> None:
        super().__init__(events, headers=HEADERS)
        self._events, self._place, self._max_unread_s = events, place, max_unread_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers as ASGI has it."""

        async def send_in_time(message: Message) -> None:
            with anyio.move_on_after(self._max_unread_s) as scope:
                await send(message)
            if scope.cancelled_caught:
                raise UnreadError

        async with self._place, aclosing(self._events):
            try:
                await super().__call__(scope, receive, send_in_time)
            except UnreadError:
                return  # an answer that is not whole: uvicorn ends the connection
