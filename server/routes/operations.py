"""GET /health, /ready, /adapters and /metrics. Translates only."""

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from lori.summary import Summary
from server.routes.dependencies import get_service
from server.schemas import AdapterInfo, AdapterList, Health
from server.service import Service

router = APIRouter()
ServiceOf = Annotated[Service, Depends(get_service)]


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
async def adapters(service: ServiceOf) -> AdapterList:
    """Lists the adapters that a request can name."""
    return AdapterList(
        base_model=service.base_model,
        adapters=[describe(of.summary) for of in service.registry.by_name.values()],
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


@router.get("/metrics", response_class=Response)
async def metrics(service: ServiceOf) -> Response:
    """Prometheus's text format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
