"""The HTTP application, built from a service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict

import anyio
from fastapi import FastAPI

from server.access.gate import Gate, client_of
from server.access.hosts import AllowedHosts, HostCheck
from server.access.limits import TenantPlaces
from server.catalog.comparison import Comparer
from server.description.openapi import Api
from server.description.responses import ADMINISTERING, GENERATING, refusals
from server.routes import (
    adapters,
    chat,
    comparison,
    completions,
    docs,
    generate,
    merges,
    models,
    operations,
    playground,
    tokens,
    vllm_adapters,
)
from server.routes.error_replies import add_error_handlers
from server.service.service import Service
from server.telemetry.request_log import RequestLog, ScopeNote
from server.transport.bodies import BodyLimit
from server.transport.cors import Cors


class State(TypedDict):
    """The values that routes find in `request.state`."""

    service: Service
    comparer: Comparer
    comparing: anyio.Lock
    """Lock of the one request that compares adapters."""
    comparisons: TenantPlaces
    """Comparisons that run or wait, by tenant."""


def create_app(service: Service) -> FastAPI:
    """Return the application. Its engine runs from startup to shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        service.engine.start()
        async with anyio.create_task_group() as group, service.admin.running():
            if service.keys:
                group.start_soon(service.keys.watch)
            yield State(service=service, comparer=Comparer(), comparing=anyio.Lock(), comparisons=TenantPlaces())
            await service.engine.stop()
            group.cancel_scope.cancel()

    app = Api(lifespan, has_keys=service.keys is not None)
    # Middleware that is added last runs first. CORS preflights carry no key, so CORS comes before authentication. The request log
    # comes before all, so that every answer is logged.
    app.add_middleware(ScopeNote)
    uploads = {("POST", "/adapters"): service.settings.max_upload_bytes}
    app.add_middleware(
        BodyLimit,
        max_bytes=service.settings.max_body_bytes,
        max_s=service.settings.max_body_s,
        uploads=uploads,
        bodies=service.bodies,
        client_of=client_of,
    )
    rate = None if service.num_ingresses else service.rate
    app.add_middleware(Gate, ring=service.keys, rate=rate, opens_metrics=service.settings.open_metrics)
    if service.keys is None:  # inside CORS, so that pages of other origins may read why they are refused
        app.add_middleware(HostCheck, hosts=AllowedHosts.from_settings(service.settings))
    if service.settings.cors_origins:
        app.add_middleware(Cors, origins=service.settings.cors_origins)
    app.add_middleware(RequestLog, metrics=service.metrics, is_draining=lambda: service.is_draining)
    # /adapters/compare must come before /adapters/{name}, which would match it.
    for routes, tag, statuses in (
        (generate, "generate", GENERATING),
        (completions, "openai", GENERATING),
        (chat, "openai", GENERATING),
        (models, "openai", ()),
        (tokens, "tokens", (400, 404, 408, 413)),
        (comparison, "adapters", (400, 404, 429)),
        (adapters, "adapters", (400,)),
        (merges, "adapters", ()),
        (vllm_adapters, "openai", ADMINISTERING),
        (operations, "operations", ()),
        (playground, "operations", ()),
        (docs, "operations", ()),
    ):
        app.include(routes.router, tag, refusals(*statuses))
    for router in (adapters.admin, merges.admin):
        app.include(router, "adapters", refusals(*ADMINISTERING))
    app.mount("/static/docs", docs.static)
    app.mount("/static", playground.static)
    add_error_handlers(app)
    return app
