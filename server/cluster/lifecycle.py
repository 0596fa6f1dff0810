"""What a replica answers before it knows of all changes, and once it is about to end. Knows no Ray."""

import anyio
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.schemas.errors import error_reply

PROBED = ("/health", "/ping", "/ready", "/metrics")
JOIN_S = 10.0
"""How long a request waits for its replica to join."""


def _refusal(message: str) -> JSONResponse:
    return JSONResponse(error_reply(503, "ServiceUnavailableError", message, None), 503, {"Retry-After": "1"})


CLOSED = _refusal("the server is about to end")
BEHIND = _refusal("the replica does not know yet which adapters were changed while it started")


class Lifecycle:
    """An ASGI application before another one: requests wait until the replica has joined, and are refused once it is closed.

    What asks how the replica is, `PROBED`, is answered at any time. No more than `max_waiting` requests wait; others are told to
    come again: each has one of Ray's places, and who lets the replica join needs one.
    """

    def __init__(self, app: ASGIApp, max_waiting: int) -> None:
        self._app, self._max_waiting, self._num_waiting = app, max_waiting, 0
        self.joined, self.is_closed = anyio.Event(), False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        app = self._app if scope["path"] in PROBED else await self._chosen()
        await app(scope, receive, send)

    async def _chosen(self) -> ASGIApp:
        # It may not have heard of an adapter that is there, or have one that is not.
        if not (self.joined.is_set() or self.is_closed) and self._num_waiting < self._max_waiting:
            self._num_waiting += 1
            try:
                with anyio.move_on_after(JOIN_S):
                    await self.joined.wait()
            finally:
                self._num_waiting -= 1
        if self.is_closed:
            return CLOSED
        return self._app if self.joined.is_set() else BEHIND
