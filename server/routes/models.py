"""GET /v1/models: the base model, and every adapter as a model on it. Only translates."""

import time
from collections.abc import Sequence

from fastapi import APIRouter
from fastapi.responses import Response

from lori.names import AUTO
from server.description.responses import refusals
from server.engine.adapters.registry import MayUse, Registered
from server.routes.dependencies import CallerOf, ServiceOf
from server.routes.references import find_model
from server.schemas.model_names import is_base, parse_model
from server.schemas.openai import ModelCard, ModelList
from server.service.service import Service

router = APIRouter()
STARTED = int(time.time())


@router.get("/v1/models", response_model=ModelList)
async def models(service: ServiceOf, caller: CallerOf) -> Response:
    """List the models that `model` can name; sums of adapters, such as `math+safety`, are not listed."""
    content = await service.admin.write_list(lambda: _encode(service, caller.may_use))
    return Response(content, media_type="application/json")


@router.get("/v1/models/{model:path}", responses=refusals(400, 404))
async def model(model: str, service: ServiceOf, caller: CallerOf) -> ModelCard:
    """Return one of these models, or the one for a `model` that names several adapters, or a version."""
    if is_base(model, service.base_names):
        return _base(service)
    if model == AUTO and service.selector:
        return _auto(service)
    adapters = await find_model(service, caller, model, parse_model(model, service.base_names).adapters)
    return _card(service, adapters).model_copy(update={"id": model})


def _encode(service: Service, may_use: MayUse) -> bytes:
    adapters = (adapter for name, adapter in service.registry.by_name.items() if may_use(name))
    cards = [
        _base(service),
        *([_auto(service)] if service.selector else []),
        *(_card(service, [adapter]) for adapter in adapters),
    ]
    return ModelList(data=cards).model_dump_json().encode()


def _base(service: Service) -> ModelCard:
    name = service.base_model
    return ModelCard(id=name, created=STARTED, root=name, parent=None, max_model_len=service.admission.max_context)


def _auto(service: Service) -> ModelCard:
    return _base(service).model_copy(update={"id": AUTO, "parent": service.base_model})


def _card(service: Service, adapters: Sequence[Registered]) -> ModelCard:
    return ModelCard(
        id="+".join(adapter.summary.name for adapter in adapters),
        created=STARTED,
        root="+".join(f"{adapter.summary.name}@{adapter.summary.version}" for adapter in adapters),
        parent=service.base_model,
        max_model_len=service.admission.max_context,
    )
