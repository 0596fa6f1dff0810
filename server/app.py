"""The HTTP application: a value built from a service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TypedDict

import anyio
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server.access.gate import Gate
from server.access.openapi import KeyedApi
from server.body_limit import BodyLimit
from server.comparison import Comparer
from server.errors import REFUSALS, add_error_handlers
from server.request_log import RequestLog, ScopeNote
from server.routes import adapters, chat, comparison, completions, generate, models, operations, playground, tokens, vllm_adapters
from server.service import Service


class State(TypedDict):
    """What routes find in `request.state`."""

    service: Service
    comparer: Comparer
    comparing: anyio.Lock
    """Held by the one request that compares adapters."""


def create_app(service: Service) -> FastAPI:
    """Returns the application; its engine runs from startup to shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        service.engine.start()
        async with anyio.create_task_group() as group, service.admin.running():
            if service.keys:
                group.start_soon(service.keys.watch)
            yield State(service=service, comparer=Comparer(), comparing=anyio.Lock())
            await service.engine.stop()
            group.cancel_scope.cancel()

    app = (KeyedApi if service.keys else FastAPI)(
        title="lori-server",
        version=version("lori-server"),
        summary="One base model, many LoRI adapters, merged in every request.",
        lifespan=lifespan,
        responses=REFUSALS,
    )
    # The last is asked first: a browser asks without a key whether it may send one, and whatever is answered is logged.
    app.add_middleware(ScopeNote)
    uploads = {("POST", "/adapters"): service.settings.max_upload_bytes}
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes, max_s=service.settings.max_body_s, others=uploads)
    app.add_middleware(Gate, ring=service.keys)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    app.add_middleware(RequestLog, service=service)
    # The comparison comes before what takes any name for an adapter's.
    for routes in (generate, completions, chat, models, tokens, comparison, adapters, vllm_adapters, operations, playground):
        app.include_router(routes.router)
    app.include_router(adapters.admin)
    app.mount("/static", playground.static)
    add_error_handlers(app)
    return app
