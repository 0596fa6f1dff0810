"""vLLM's routes to load and unload LoRA adapters, with its bodies, texts and statuses. Only translates."""

import re

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from lori.errors import AdapterError, UnknownAdapterError
from lori.names import split_reference
from lori.store.hub import SCHEME
from server.catalog.admin import AlreadyLoadedError
from server.engine.generate_request import RefusedError
from server.routes.dependencies import ServiceOf, require_admin
from server.routes.json_route import JsonRoute
from server.routes.uploads import checked_name
from server.schemas.adapters import HUB_ID, REVISION, LoadLoraBody, UnloadLoraBody
from server.schemas.errors import error_reply
from server.service.service import Service

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_admin)])
ON_HUB = re.compile(f"({SCHEME})?(?P<id>{HUB_ID[1:-1]})(@(?P<revision>{REVISION[1:-1]}))?")


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLoraBody, service: ServiceOf) -> Response:
    """Let requests name an adapter of the server's store, until the server ends; or one on the hub, which is stored."""
    name = body.lora_name
    if not name or not body.lora_path:
        return _refusal("Both 'lora_name' and 'lora_path' must be provided.")
    if body.is_3d_lora_weight:
        raise RefusedError("is_3d_lora_weight", "is true, expected false: no adapter here has such weights")
    try:
        await _load(service, checked_name(name, "lora_name"), body)
    except AlreadyLoadedError:
        remedy = "If you want to load the adapter in place, set 'load_inplace' to True."
        return _refusal(f"The lora adapter '{name}' has already been loaded. {remedy}")
    except UnknownAdapterError:
        return _refusal(f"Loading lora {name} failed: No adapter found for {body.lora_path}", 404, "NotFoundError")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLoraBody, service: ServiceOf) -> Response:
    """Let no more requests name an adapter; its files stay."""
    name = body.lora_name
    if not name:
        return _refusal("'lora_name' needs to be provided to unload a LoRA adapter.")
    if name not in service.registry.by_name:
        return _refusal(f"The lora adapter '{name}' cannot be found.", 404, "NotFoundError")
    await service.admin.unload(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _load(service: Service, name: str, body: LoadLoraBody) -> None:
    source, may_replace = body.lora_path, body.load_inplace
    if _is_reference(source):
        await service.admin.load(source, name, may_replace)
        return
    match = ON_HUB.fullmatch(source)
    if match is None or ".." in source:
        raise RefusedError("lora_path", f"is {source!r}, expected the name of an adapter in the server's store: no path is read")
    if not service.settings.hub:
        expected = "an adapter in the server's store: no path is read, and nothing from the hub where the server has no --hub"
        raise RefusedError("lora_path", f"is {source!r}, expected {expected}")
    revision = f"@{match['revision']}" if match["revision"] else ""
    await service.admin.publish_from_hub(name, f"{SCHEME}{match['id']}{revision}", may_replace)


def _is_reference(source: str) -> bool:
    try:
        split_reference(source)
    except AdapterError:
        return False
    return True


def _refusal(message: str, status: int = 400, kind: str = "InvalidUserInput") -> JSONResponse:
    return JSONResponse(error_reply(status, kind, message, None), status)
