"""A replica: one engine with the whole HTTP application, in a Ray actor. It answers relayed requests."""

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
    """The actor that answers relayed requests. Ray creates it, checks its health, and ends it when its requests have ended."""

    async def __init__(self, settings: Settings, num_ingresses: int) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load everything. `num_ingresses` send requests to the replica. Raises as `load_service` and `start_tracing`."""
        from server.app import create_app  # noqa: PLC0415  # processes that only start or use replicas need no torch
        from server.loading import load_service  # noqa: PLC0415

        # Ray's own redirection of standard error loses lines.
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
        self._num_under_way = 0

    async def asgi(
        self,
        scope: Mapping[str, Any],
        body: bytes,
        key: str = "",  # noqa: ARG002  # the router reads it
    ) -> AsyncGenerator[Sequence[Message], None]:
        """Yield the answer to a request, see `relay.answer` and `Lifecycle`."""
        async with aclosing(self._relayed(scope, body)) as answers:
            async for messages in answers:
                yield messages

    async def whole(self, scope: Mapping[str, Any], body: bytes) -> tuple[str, Sequence[Message]]:
        """Return the replica's name, and its whole answer to a request that all replicas get.

        Before the replica has joined, the answer is empty, except to probes.
        """
        if scope["path"] not in PROBED and not self._lifecycle.joined.is_set():
            return _own_name(), []
        messages = [message async for batch in self._relayed(scope, body) for message in batch]
        return _own_name(), messages

    async def beat(self) -> tuple[bool, Collection[str]]:
        """Return whether this replica has joined, and its pinned names. The call itself shows whether it can be reached."""
        return self._lifecycle.joined.is_set(), [*self._service.admin.pins]

    async def join(self, pins: Collection[str]) -> None:
        """Catch up with the changes since this replica read the store and the named merges. From now on it gets changes itself.

        `pins` are those of the other replicas. Raises `StoreError` or `ConflictError` if the store or the folder of merges
        cannot be read; the replica has then not joined.
        """
        from server.catalog.admin import catch_up  # noqa: PLC0415  # see `__init__`

        async with self._joining:
            if not self._lifecycle.joined.is_set():
                if self._service.files:
                    await catch_up(self._service.admin, self._service.files, self._service.registry, pins)
                await self._service.merge_admin.catch_up()
            self._lifecycle.joined.set()

    def retire(self) -> None:
        """Make /ready report that the replica is not ready. Requests are answered as before."""
        self._service.is_draining = True

    def close(self) -> int:
        """Refuse new requests, too. Return the number of requests under way."""
        self.retire()
        self._lifecycle.is_closed = True
        return self._num_under_way

    def check_health(self) -> None:
        """Raise if the engine, or a background task, has ended: Ray then replaces this replica.

        A replica that is about to end is healthy.
        """
        self._service.check_alive()
        self._running.check()

    async def __del__(self) -> None:
        """End the engine, and send the traces that are left."""
        try:
            await self._running.end()
        finally:
            if self._tracing:
                await run_in_threadpool(self._tracing.stop)

    async def _relayed(self, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Sequence[Message], None]:
        self._num_under_way += 1
        try:
            async with aclosing(answer(self._lifecycle, {**scope, "state": dict(self._state or {})}, body)) as answers:
                async for messages in answers:
                    yield messages
        finally:
            self._num_under_way -= 1


def _own_name() -> str:
    return serve.get_replica_context().replica_id.unique_id
