"""GET /v1/models: the base model, and every adapter as a model on it. Translates only."""

import time

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from server.description.responses import refusals
from server.engine.adapters.registry import Registered
from server.engine.adapters.resolution import FaultyAdapterError, MayUse, unknown
from server.errors import FieldError
from server.model_names import is_base
from server.routes.dependencies import CallerOf, ServiceOf
from server.routes.references import explained_model
from server.schemas.openai import ModelCard, ModelList
from server.service import Service

router = APIRouter()
STARTED = int(time.time())


@router.get("/v1/models", response_model=ModelList)
async def models(service: ServiceOf, caller: CallerOf) -> Response:
    """Lists the models that `model` can name; adapters that are added, as `math+safety`, are not listed."""
    content = await service.admin.listed(lambda: _encode(service, caller.may_use))
    return Response(content, media_type="application/json")


@router.get("/v1/models/{model:path}", responses=refusals(404))
async def model(model: str, service: ServiceOf, caller: CallerOf) -> ModelCard:
    """Returns one of them."""
    if is_base(model, service.base_names):
        return _base(service)
    found, is_allowed = service.registry.by_name.get(model), caller.may_use(model)
    if found is not None and is_allowed:
        return _card(service, found)
    error = await run_in_threadpool(unknown, service.registry, model, caller.may_use)
    if isinstance(error, FaultyAdapterError):
        raise FieldError("model", error)
    raise explained_model(service, caller, model, error)


def _encode(service: Service, may_use: MayUse) -> bytes:
    adapters = (of for name, of in service.registry.by_name.items() if may_use(name))
    return ModelList(data=[_base(service), *(_card(service, of) for of in adapters)]).model_dump_json().encode()


def _base(service: Service) -> ModelCard:
    name = service.base_model
    return ModelCard(id=name, created=STARTED, root=name, parent=None, max_model_len=service.admission.max_context)


def _card(service: Service, of: Registered) -> ModelCard:
    return ModelCard(
        id=of.summary.name,
        created=STARTED,
        root=f"{of.summary.name}@{of.summary.version}",
        parent=service.base_model,
        max_model_len=service.admission.max_context,
    )
