"""The HTTP application: a value built from a service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TypedDict

from fastapi import FastAPI

from server.body_limit import BodyLimit
from server.errors import REFUSALS, add_error_handlers
from server.routes import adapters, generate, operations, vllm_adapters
from server.service import Service


class State(TypedDict):
    """What routes find in `request.state`."""

    service: Service


def create_app(service: Service) -> FastAPI:
    """Returns the application; its engine runs from startup to shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        service.engine.start()
        async with service.admin.running():
            yield State(service=service)
            await service.engine.stop()

    app = FastAPI(
        title="lori-server",
        version=version("lori-server"),
        summary="One base model, many LoRI adapters, merged in every request.",
        lifespan=lifespan,
        responses=REFUSALS,
    )
    uploads = {("POST", "/adapters"): service.settings.max_upload_bytes}
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes, others=uploads)
    app.include_router(generate.router)
    for router in (adapters.router, adapters.admin, vllm_adapters.router):
        app.include_router(router)
    app.include_router(operations.router)
    add_error_handlers(app)
    return app
