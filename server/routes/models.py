"""GET /v1/models: the base model, and every adapter as a model on it. Only translates."""

import time
from collections.abc import Sequence

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from lori.named_merge import NamedMerge
from lori.names import AUTO
from server.access.caller import Caller
from server.description.responses import refusals
from server.engine.adapter_selection import checked_selector, is_auto
from server.engine.adapters.registry import Registered
from server.engine.generate_request import GenerateRequest, RefusedError
from server.errors import FieldError, IncompleteMergeError
from server.routes.dependencies import CallerOf, ServiceOf
from server.routes.references import find_model
from server.schemas.model_names import is_base, parse_model, weighted_model_of
from server.schemas.openai import ModelCard, ModelList
from server.service.service import Service

router = APIRouter()
STARTED = int(time.time())


@router.get("/v1/models", response_model=ModelList)
async def models(service: ServiceOf, caller: CallerOf) -> Response:
    """List the models that `model` can name; sums of adapters, such as `math+safety`, are listed if they have a name."""
    content = await service.admin.write_list(lambda: _encode(service, caller))
    return Response(content, media_type="application/json")


@router.get("/v1/models/{model:path}", responses=refusals(400, 404))
async def model(model: str, service: ServiceOf, caller: CallerOf) -> ModelCard:
    """Return one of these models, or the one for a `model` that names several adapters, or a version."""
    if is_base(model, service.base_names):
        return _base(service)
    named = parse_model(model, service.base_names)
    request = GenerateRequest(
        prompt="", adapters=named.adapters, weights=named.weights, may_use=caller.may_use, policy=caller.policy
    )
    try:
        if merge := service.merges.find(model, caller.may_use):
            service.merges.check_complete(model, merge)
            return _merge(service, model, merge)
        if is_auto(request):
            selector = checked_selector(service.selector)
            await run_in_threadpool(selector.check, request)
            return _auto(service).model_copy(update={"id": model})
        resolved = service.merges.resolve(request)
        adapters = await find_model(service, caller, model, resolved.adapters)
        # Both raise if every request with this name would be refused.
        summaries = [adapter.summary for adapter in adapters]
        weights = service.admission.weights.check(resolved, summaries) or (1.0,) * len(summaries)
        service.admission.check_merge(resolved, summaries, [1.0 if one == "auto" else one for one in weights], ())
    except RefusedError as error:
        raise RefusedError("model", error.message) from error
    except IncompleteMergeError as error:
        raise FieldError("model", error) from error
    card = _card(service, adapters).model_copy(update={"id": model})
    if resolved is request:
        return card
    assert isinstance(resolved.weights, tuple)
    # A model's name cannot have block weights.
    root = model if resolved.block_weights else weighted_model_of(resolved.adapters, resolved.weights)
    return card.model_copy(update={"root": root})


def _encode(service: Service, caller: Caller) -> bytes:
    adapters = (adapter for name, adapter in service.registry.by_name.items() if caller.may_use(name))
    can_select = service.selector and service.selector.can_select(caller.may_use, caller.policy)
    cards = [
        _base(service),
        *([_auto(service)] if can_select else []),
        *(_card(service, [adapter]) for adapter in adapters),
        *(_merge(service, name, merge) for name, merge in service.merges.complete(caller.may_use).items()),
    ]
    return ModelList(data=cards).model_dump_json().encode()


def _base(service: Service) -> ModelCard:
    name = service.base_model
    return ModelCard(id=name, created=STARTED, root=name, parent=None, max_model_len=service.admission.max_context)


def _auto(service: Service) -> ModelCard:
    return _base(service).model_copy(update={"id": AUTO, "parent": service.base_model})


def _merge(service: Service, name: str, merge: NamedMerge) -> ModelCard:
    root = name if merge.has_block_weights else merge.model
    return _base(service).model_copy(update={"id": name, "root": root, "parent": service.base_model})


def _card(service: Service, adapters: Sequence[Registered]) -> ModelCard:
    return ModelCard(
        id="+".join(adapter.summary.name for adapter in adapters),
        created=STARTED,
        root="+".join(f"{adapter.summary.name}@{adapter.summary.version}" for adapter in adapters),
        parent=service.base_model,
        max_model_len=service.admission.max_context,
    )
