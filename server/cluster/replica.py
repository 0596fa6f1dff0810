"""One engine with the whole HTTP application before it, in an actor of Ray's: it answers requests that others took."""

import logging
import sys
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import anyio
from ray import serve
from starlette.concurrency import run_in_threadpool
from starlette.types import Message

from server.cluster.lifecycle import PROBED, Lifecycle, Lifespan
from server.cluster.relay import answer
from server.settings import Settings
from server.telemetry.logs import configure_log
from server.telemetry.tracing import start_tracing

logger = logging.getLogger(__name__)


class Replica:
    """Answers relayed requests. Ray makes it, asks after its health, and ends it when its requests have ended."""

    async def __init__(self, settings: Settings, num_ingresses: int) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load everything, to answer what so many ingresses send. Raises as `load_service` and `start_tracing`."""
        from server.app import create_app  # noqa: PLC0415  # who only starts replicas, or sends them requests, needs no torch
        from server.loading import load_service  # noqa: PLC0415

        # Ray's own place for it loses lines.
        configure_log(settings.log_format, sys.__stderr__, replica=_own_name())
        self._tracing = start_tracing(settings.otlp_traces_endpoint)
        self._service = await run_in_threadpool(load_service, settings, num_ingresses)
        logger.info("loaded: %s", self._service.outline)
        self._app = create_app(self._service)
        if self._tracing:
            self._tracing.instrument(self._app)
        self._running = Lifespan(self._app.router.lifespan_context(self._app))
        self._state = await self._running.start()
        self._lifecycle, self._joining = Lifecycle(self._app, settings.max_requests), anyio.Lock()
        self._num_asked = 0

    async def asgi(
        self,
        scope: Mapping[str, Any],
        body: bytes,
        key: str = "",  # noqa: ARG002  # the router reads it
    ) -> AsyncGenerator[Sequence[Message], None]:
        """Yield the answer to a request, see `relay.answer` and `Lifecycle`."""
        async with aclosing(self._answered(scope, body)) as answers:
            async for messages in answers:
                yield messages

    async def whole(self, scope: Mapping[str, Any], body: bytes) -> tuple[str, Sequence[Message]]:
        """Return the replica's name, and its whole answer to a request that all replicas hear.

        That of one that has not joined yet is empty, but to what asks how it is.
        """
        if scope["path"] not in PROBED and not self._lifecycle.joined.is_set():
            return _own_name(), []
        messages = [message async for some in self._answered(scope, body) for message in some]
        return _own_name(), messages

    async def beat(self) -> tuple[bool, Collection[str]]:
        """Return whether this replica has joined, and what is pinned here; or the caller learns that it cannot be reached."""
        return self._lifecycle.joined.is_set(), [*self._service.admin.pins]

    async def join(self, pins: Collection[str]) -> None:
        """Make good what was changed since this replica read the store; from now on it hears of changes. `pins`: the others'.

        Raises `StoreError` where the store fails: it has not joined then.
        """
        from server.catalog.admin import catch_up  # noqa: PLC0415  # see `__init__`

        async with self._joining:
            if not self._lifecycle.joined.is_set() and self._service.files:
                await catch_up(self._service.admin, self._service.files, self._service.registry, pins)
            self._lifecycle.joined.set()

    def retire(self) -> None:
        """Have /ready say that it is not; requests are answered as before."""
        self._service.is_draining = True

    def close(self) -> int:
        """Have new requests refused, too; returns how many are under way."""
        self.retire()
        self._lifecycle.is_closed = True
        return self._num_asked

    def check_health(self) -> None:
        """Raise where the engine, or a task beside the requests, has ended: Ray then puts another replica in this one's place.

        One that is to end is sound.
        """
        self._service.check_alive()
        self._running.check()

    async def __del__(self) -> None:
        """End the engine, and sends the traces that are left."""
        try:
            await self._running.end()
        finally:
            if self._tracing:
                await run_in_threadpool(self._tracing.stop)

    async def _answered(self, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Sequence[Message], None]:
        self._num_asked += 1
        try:
            async with aclosing(answer(self._lifecycle, {**scope, "state": dict(self._state or {})}, body)) as answers:
                async for messages in answers:
                    yield messages
        finally:
            self._num_asked -= 1


def _own_name() -> str:
    return serve.get_replica_context().replica_id.unique_id
