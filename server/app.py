"""The HTTP application: a value built from a service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TypedDict

import anyio
from fastapi import FastAPI

from server.body_limit import BodyLimit
from server.comparison import Comparer
from server.errors import REFUSALS, add_error_handlers
from server.routes import comparison, generate, operations, playground
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
        yield State(service=service, comparer=Comparer(), comparing=anyio.Lock())
        await service.engine.stop()

    app = FastAPI(
        title="lori-server",
        version=version("lori-server"),
        summary="One base model, many LoRI adapters, merged in every request.",
        lifespan=lifespan,
        responses=REFUSALS,
    )
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes)
    app.include_router(generate.router)
    # Before what takes any name for an adapter's.
    app.include_router(comparison.router)
    app.include_router(operations.router)
    app.include_router(playground.router)
    app.mount("/static", playground.static)
    add_error_handlers(app)
    return app
