"""The HTTP application: a value built from a service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TypedDict

from fastapi import FastAPI

from server.body_limit import BodyLimit
from server.errors import REFUSALS, add_error_handlers
from server.request_log import RequestLog
from server.routes import generate, operations
from server.service import Service


class State(TypedDict):
    """What routes find in `request.state`."""

    service: Service


def create_app(service: Service) -> FastAPI:
    """Returns the application; its engine runs from startup to shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        service.engine.start()
        yield State(service=service)
        await service.engine.stop()

    app = FastAPI(
        title="lori-server",
        version=version("lori-server"),
        summary="One base model, many LoRI adapters, merged in every request.",
        lifespan=lifespan,
        responses=REFUSALS,
    )
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes, max_s=service.settings.max_body_s)
    app.add_middleware(RequestLog, service=service)  # the last one added is the outermost
    app.include_router(generate.router)
    app.include_router(operations.router)
    add_error_handlers(app)
    return app
