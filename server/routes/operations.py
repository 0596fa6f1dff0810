"""GET /health, /ping, /ready, /version and /metrics. Only translates."""

from importlib.metadata import version as version_of

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.description.responses import Responses, refusals
from server.routes.dependencies import ServiceOf, require_monitor
from server.schemas.generation import Health, Version

router = APIRouter()
METRICS: Responses = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}, "example": "lori:adapters_registered 4.0\n"}}}
}


@router.get("/health", responses=refusals(503))
async def health(service: ServiceOf) -> Health:
    """Answer 200 as long as the engine runs, also while the server is about to end; else the server is to be restarted."""
    service.check_alive()
    return Health(status="ok")


@router.get("/ping", responses=refusals(503))
async def ping(service: ServiceOf) -> Health:
    """The same as GET /health, under the name that vLLM and SageMaker hosts use."""
    return await health(service)


@router.get("/version")
async def version() -> Version:
    """Return the version of lori-server."""
    return Version(version=version_of("lori-server"))


@router.get("/ready", responses=refusals(503))
async def ready(service: ServiceOf) -> Health:
    """Answer 200 while requests can be answered, and the server is not about to end."""
    service.check_ready()
    return Health(status="ready")


@router.get("/metrics", response_class=Response, responses=METRICS, dependencies=[Depends(require_monitor)])
async def metrics(service: ServiceOf) -> Response:
    """Return the metrics in Prometheus's text format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
