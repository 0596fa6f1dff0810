"""One engine with the whole HTTP application before it, in an actor of Ray's: it answers requests that others took."""

import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from ray import serve
from starlette.concurrency import run_in_threadpool
from starlette.types import Message

from server.cluster.relay import answer
from server.settings import Settings
from server.telemetry.logs import configure_log
from server.telemetry.tracing import start_tracing


class Replica:
    """Answers relayed requests. Ray makes it, asks after its health, and ends it when its requests have ended."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        """Loads everything. Raises as `load_service` and `start_tracing`."""
        from server.app import create_app  # noqa: PLC0415  # who only starts replicas, or sends them requests, needs no torch
        from server.loading import load_service  # noqa: PLC0415

        # Ray's own place for it loses lines.
        configure_log(settings.log_format, sys.__stderr__, replica=_own_name())
        self._tracing = start_tracing(settings.otlp_traces_endpoint)
        self._service = await run_in_threadpool(load_service, settings)
        self._app = create_app(self._service)
        if self._tracing:
            self._tracing.instrument(self._app)
        self._running = AsyncExitStack()
        self._state = await self._running.enter_async_context(self._app.router.lifespan_context(self._app))

    async def asgi(
        self,
        scope: Mapping[str, Any],
        body: bytes,
        key: str = "",  # noqa: ARG002  # the router reads it
    ) -> AsyncGenerator[Sequence[Message], None]:
        """Yields the answer to a request, see `relay.answer`."""
        async for messages in answer(self._app, self._scope(scope), body):
            yield messages

    async def whole(self, scope: Mapping[str, Any], body: bytes) -> tuple[str, Sequence[Message]]:
        """Returns the replica's name, and its whole answer to a request that all replicas hear."""
        messages = [message async for some in answer(self._app, self._scope(scope), body) for message in some]
        return _own_name(), messages

    async def beat(self) -> None:
        """Does nothing: whoever calls it is answered, or learns that this replica cannot be reached."""

    def retire(self) -> None:
        """Has /ready say that it is not; requests are answered as before."""
        self._service.is_draining = True

    def check_health(self) -> None:
        """Raises where the engine has ended: Ray then puts another replica in this one's place."""
        self._service.check_ready()

    async def __del__(self) -> None:
        """Ends the engine, and sends the traces that are left."""
        await self._running.aclose()
        if self._tracing:
            await run_in_threadpool(self._tracing.stop)

    def _scope(self, scope: Mapping[str, Any]) -> dict[str, Any]:
        return {**scope, "state": dict(self._state or {})}


def _own_name() -> str:
    return serve.get_replica_context().replica_id.unique_id
