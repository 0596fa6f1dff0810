"""The life of a replica: its start and end, its replies before it has joined and once it is closing, and the absence of all
replicas.

Ray starts a replica in one of its tasks and ends it in another, and what anyio runs ends only in the task that began it: so an
application's lifespan has a task of its own. Before a replica has all changes, and while none is there, requests wait, but not
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


Given = TypeVar("Given")


class Lifespan(Generic[Given]):
    """Runs `context` from `start` to `end`, which any tasks may call, each once."""

    def __init__(self, context: AbstractAsyncContextManager[Given]) -> None:
        self._context = context
        self._is_to_end = asyncio.Event()

    async def start(self) -> Given:
        """Return what the context gives. Raises what it raises."""
        started: asyncio.Future[Given] = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._run(started))
        either: set[asyncio.Future[Any]] = {started, self._running}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            await self._running
        return await started

    def check(self) -> None:
        """Raise what the context has raised since it was entered, if anything."""
        if self._running.done():
            self._running.result()

    async def end(self) -> None:
        """Leave the context. Raises what it raises, or has raised since it was entered."""
        self._is_to_end.set()
        await self._running

    async def _run(self, started: asyncio.Future[Given]) -> None:
        async with self._context as given:
            started.set_result(given)
            await self._is_to_end.wait()


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
        """Answer a request."""
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


WAIT_S = 30.0
"""Of an absence, how long requests wait for its end. What asks how the server is does not wait: who asks wants to know it."""


class Absence:
    """The time in which no replica is there; before the first one came there is none: that is the start."""

    def __init__(self) -> None:
        self._is_begun = False
        self._since: float | None = None

    def note(self, *, is_there: bool) -> None:
        """Take whether a replica is there at the moment."""
        if is_there:
            self._is_begun, self._since = True, None
        elif self._is_begun and self._since is None:
            self._since = anyio.current_time()
            logger.warning("no replica is there; requests wait for %g s, others are told to come again", WAIT_S)

    def is_too_long(self, path: str) -> bool:
        """Return whether a request of this path waits no more."""
        return self._since is not None and (path in PROBED or anyio.current_time() - self._since >= WAIT_S)
