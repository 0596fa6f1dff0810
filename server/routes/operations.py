"""GET /health, /ready, /adapters and /metrics. Translates only."""

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from lori.summary import Summary
from server.routes.dependencies import CallerOf, ServiceOf, require_monitor
from server.schemas.adapters import AdapterInfo, AdapterList
from server.schemas.generation import Health

router = APIRouter()


@router.get("/health")
async def health() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok")


@router.get("/ready")
async def ready(service: ServiceOf) -> Health:
    """Answers 200 while requests can be answered, and the server is not about to end."""
    service.check_ready()
    return Health(status="ready")


@router.get("/adapters")
async def adapters(service: ServiceOf, caller: CallerOf) -> AdapterList:
    """Lists the adapters that a request with this key can name."""
    return AdapterList(
        base_model=service.base_model,
        adapters=[describe(of.summary) for name, of in service.registry.by_name.items() if caller.may_use(name)],
    )


def describe(adapter: Summary) -> AdapterInfo:
    """Returns what a client is told of an adapter."""
    return AdapterInfo(
        name=adapter.name,
        version=adapter.version,
        rank=adapter.rank,
        alpha=adapter.alpha,
        sparsity=adapter.sparsity,
        templates=list(adapter.templates),
        merge_weights=dict(adapter.merge_weights),
        metrics=dict(adapter.metrics),
    )


@router.get("/metrics", response_class=Response, dependencies=[Depends(require_monitor)])
async def metrics(service: ServiceOf) -> Response:
    """Prometheus's text format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
