"""A response of server-sent events that holds a request's place, and releases it however it ends."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, suppress
from time import monotonic

import anyio
from fastapi.sse import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip. It keeps proxies from closing a connection that is silent for long."""


class UnreadError(Exception):
    """The client reads nothing."""


class EventStream(EventSourceResponse):
    """Response that sends `events` and closes `place` at the end, also if the client disconnects before the first event.

    A client that reads nothing for `max_unread_s` is disconnected. A client that waits for its next event is sent a comment every
    `keep_alive_s`.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        place: AsyncExitStack,
        max_unread_s: float,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        super().__init__(events, headers=HEADERS)
        self._events, self._place, self._max_unread_s, self._keep_alive_s = events, place, max_unread_s, keep_alive_s
        self._quiet_since: float | None = None
        """Time of the last message; None before the first, and while one is being sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, as an ASGI application."""

        async def send_in_time(message: Message) -> None:
            self._quiet_since = None
            with anyio.move_on_after(self._max_unread_s) as scope:
                await send(message)
            if scope.cancelled_caught:
                raise UnreadError
            self._quiet_since = monotonic()

        async with self._place, aclosing(self._events):
            keep_alive = asyncio.create_task(self._keep_alive(send))
            try:
                await super().__call__(scope, receive, send_in_time)
            except UnreadError:
                return  # the answer is incomplete, so uvicorn closes the connection
            finally:
                keep_alive.cancel()

    async def _keep_alive(self, send: Send) -> None:
        # Each message is a whole event, so a comment between two messages is between two events.
        with suppress(OSError):  # the client has gone, which the sender of events notices, too
            while True:
                remaining_s = self._keep_alive_s
                if self._quiet_since is not None:
                    remaining_s += self._quiet_since - monotonic()
                if remaining_s > 0:
                    await asyncio.sleep(remaining_s)
                    continue
                self._quiet_since = monotonic()
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
