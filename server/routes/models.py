"""GET /v1/models: the base model, and every adapter as a model on it. Translates only."""

import time
from typing import Annotated

from fastapi import APIRouter, Depends

from server.engine.adapters.registry import Registered
from server.model_names import UnknownModelError
from server.routes.dependencies import get_service
from server.schemas.openai import ModelCard, ModelList
from server.service import Service

router = APIRouter()
ServiceOf = Annotated[Service, Depends(get_service)]
STARTED = int(time.time())


@router.get("/v1/models")
async def models(service: ServiceOf) -> ModelList:
    """Lists the models that `model` can name; adapters that are added, as `math+safety`, are not listed."""
    return ModelList(data=[_base(service), *(_card(service, of) for of in service.registry.by_name.values())])


@router.get("/v1/models/{model:path}")
async def model(model: str, service: ServiceOf) -> ModelCard:
    """Returns one of them."""
    if model == service.base_model:
        return _base(service)
    if found := service.registry.by_name.get(model):
        return _card(service, found)
    raise UnknownModelError(model)


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
