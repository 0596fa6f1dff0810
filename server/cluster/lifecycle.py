"""The life of a replica: its start and end, its replies before it has joined and while it closes, and outages of all replicas.

Ray starts a replica in one of its tasks and ends it in another, but anyio's contexts must end in the task that began them. So an
application's lifespan has a task of its own. Requests wait while a replica lacks changes, and while there is no replica, but not
for ever. Knows no Ray.
"""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

import anyio
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.schemas.errors import error_reply

logger = logging.getLogger(__name__)


Value = TypeVar("Value")


class Lifespan(Generic[Value]):
    """The life of `context`, from `start` to `end`. Any task may call each of them, once."""

    def __init__(self, context: AbstractAsyncContextManager[Value]) -> None:
        self._context = context
        self._should_end = asyncio.Event()

    async def start(self) -> Value:
        """Return the context's value. Raises what the context raises."""
        started: asyncio.Future[Value] = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._run(started))
        either: set[asyncio.Future[Any]] = {started, self._running}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            await self._running
        return await started

    def check(self) -> None:
        """Raise the error that the context has raised since it was entered, if any."""
        if self._running.done():
            self._running.result()

    async def end(self) -> None:
        """Leave the context. Raises what the context raises, or has raised since it was entered."""
        self._should_end.set()
        await self._running

    async def _run(self, started: asyncio.Future[Value]) -> None:
        async with self._context as value:
            started.set_result(value)
            await self._should_end.wait()


PROBED = ("/health", "/ping", "/ready", "/metrics")
JOIN_S = 10.0
"""Seconds that a request waits for its replica to join."""


def _refusal(message: str) -> JSONResponse:
    return JSONResponse(error_reply(503, "ServiceUnavailableError", message, None), 503, {"Retry-After": "1"})


CLOSED = _refusal("the server is about to end")
BEHIND = _refusal("the replica does not know yet which adapters were changed while it started")


class Lifecycle:
    """ASGI middleware: requests wait until the replica has joined, and are refused once it is closed.

    The probes of `PROBED` are answered at any time. At most `max_waiting` requests wait; others are told to retry. Each has one
    of Ray's places, and the call that lets the replica join needs one, too.
    """

    def __init__(self, app: ASGIApp, max_waiting: int) -> None:
        self._app, self._max_waiting, self._num_waiting = app, max_waiting, 0
        self.joined, self.is_closed = anyio.Event(), False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        app = self._app if scope["path"] in PROBED else await self._choose_app()
        await app(scope, receive, send)

    async def _choose_app(self) -> ASGIApp:
        # Before it has joined, a replica may lack an adapter, or have one that was deleted.
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


WAIT_S = 30.0
"""Seconds of an outage for which requests wait for its end. Probes do not wait: they must show the outage."""


class Outage:
    """An outage: the time without any replica. The time before the first replica, the start, is none."""

    def __init__(self) -> None:
        self._has_begun = False
        self._since: float | None = None

    def update(self, *, has_replica: bool) -> None:
        """Update whether there is a replica now."""
        if has_replica:
            self._has_begun, self._since = True, None
        elif self._has_begun and self._since is None:
            self._since = anyio.current_time()
            logger.warning("no replica is there; requests wait for %g s, others are told to come again", WAIT_S)

    def is_too_long(self, path: str) -> bool:
        """Return whether a request of this path no longer waits."""
        return self._since is not None and (path in PROBED or anyio.current_time() - self._since >= WAIT_S)
