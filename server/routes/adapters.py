"""Routes that list, show and change adapters. They only translate."""

from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lori.names import NAME, VERSION
from lori.store.hub import SCHEME, name_in
from server.catalog.admin import Withdrawal
from server.description.responses import refusals
from server.engine.adapters.registry import Registered
from server.engine.generate_request import RefusedError
from server.routes.adapter_rows import describe_details, describe_one, encode_list
from server.routes.dependencies import CallerOf, ServiceOf, check_query, require_admin
from server.routes.json_route import JsonRoute
from server.routes.references import find
from server.routes.uploads import REQUEST_BODY, checked_name, checked_reference, hub_body, read_upload
from server.schemas.adapters import AdapterDetail, AdapterInfo, AdapterList, AliasBody, WithdrawnReply
from server.service.service import Service

router = APIRouter()
admin = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_admin)])
NamePath = Annotated[str, Path(description="An adapter's name.", json_schema_extra={"pattern": f"^{NAME.pattern}$"})]
ReferencePath = Annotated[
    str,
    Path(
        description="`name` or `name@version`, of which the first digits will do.",
        json_schema_extra={"pattern": f"^{NAME.pattern}(@{VERSION.pattern})?$"},
    ),
]
"""Only for the description. Names are checked elsewhere."""
WITHDRAWN: dict[int | str, dict[str, Any]] = {
    200: {"description": "Nothing of it is left in memory"},
    202: {"model": WithdrawnReply, "description": "Requests under way still use it: the rest follows when the last has ended"},
}


@router.get("/adapters", response_model=AdapterList, dependencies=[Depends(check_query)])
async def list_adapters(
    service: ServiceOf,
    caller: CallerOf,
    prefix: str = "",
    after: str = "",
    limit: Annotated[int | None, Query(ge=1)] = None,
) -> Response:
    """List the adapters and named merges that the caller may use: at most `limit` in all, from the one after `after`."""
    content = await service.admin.write_list(lambda: encode_list(service, caller, prefix, after, limit))
    return Response(content, media_type="application/json")


@router.get("/adapters/{name}", responses=refusals(404))
async def show_adapter(name: ReferencePath, service: ServiceOf, caller: CallerOf) -> AdapterDetail:
    """Show an adapter, `name` or `name@version`, with its card and each of its modules. The first time takes a while."""
    with service.limiter.places(caller):
        [adapter] = await find(service, caller, [name], "name")
        details = await service.admin.details(adapter)
        return await run_in_threadpool(describe_details, service, adapter, details, caller)


@admin.post(
    "/adapters",
    status_code=201,
    response_model=AdapterInfo,
    responses=refusals(415),
    openapi_extra={"requestBody": REQUEST_BODY},
)
async def publish(http: Request, service: ServiceOf, response: Response) -> AdapterInfo | Response:
    """Put an adapter in the server's store, as a new version of its name, which then refers to it.

    A form has the files of an adapter's folder, or of a PEFT LoRA's whose A the server was started for. JSON names an adapter on
    the hub, if the server has --hub. An adapter that is not sound is refused as a whole, with its faults. Requests under way end
    on the version that they began with.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in KINDS:
        raise HTTPException(415, f"Content-Type is {kind!r}, expected {' or '.join(KINDS)}")
    try:
        adapter = await KINDS[kind](http, service)
    except ClientDisconnect:
        return Response(status_code=499)
    response.headers["Location"] = f"/adapters/{adapter.summary.name}"
    return describe_one(service, adapter)


async def _publish_form(http: Request, service: Service) -> Registered:
    async with service.admin.receiving():
        upload = await read_upload(http)
        return await service.admin.publish(upload.name, upload.files)


async def _publish_from_hub(http: Request, service: Service) -> Registered:
    body = await hub_body(http, service.settings.max_body_bytes)
    if not service.settings.hub:
        raise RefusedError("hub_id", "this server loads nothing from the hub: start it with --hub, or upload the files")
    source = f"{SCHEME}{body.hub_id}" + (f"@{body.revision}" if body.revision else "")
    return await service.admin.publish_from_hub(checked_name(body.name or name_in(source)), source)


KINDS = {"multipart/form-data": _publish_form, "application/json": _publish_from_hub}


@admin.delete("/adapters/{name}", response_model=WithdrawnReply, responses=WITHDRAWN)
async def delete(name: ReferencePath, service: ServiceOf) -> Response:
    """Delete a name with all its versions, a version (`name@version`) or an alias, in the store, too.

    New requests for it are answered 404. Requests under way end on it, and its files stay until then.
    """
    return await _withdraw(service.admin.delete(checked_reference(name)))


@admin.put("/adapters/{name}/alias")
async def set_alias(name: NamePath, body: AliasBody, service: ServiceOf) -> AdapterInfo:
    """Make a name refer to the present version of another name, or to one of its own versions, in the store, too."""
    reference = checked_reference(body.adapter, "adapter")
    return describe_one(service, await service.admin.alias(checked_name(name), reference))


@admin.post("/adapters/{name}/load")
async def load(name: NamePath, service: ServiceOf) -> AdapterInfo:
    """Load the name's adapter from the store: one that was unloaded, or was put there since."""
    return describe_one(service, await service.admin.load(checked_name(name)))


@admin.post("/adapters/{name}/unload", response_model=WithdrawnReply, responses=WITHDRAWN)
async def unload(name: ReferencePath, service: ServiceOf) -> Response:
    """Withdraw a name with its versions, or a version that is not the name's current one. `load` brings it back.

    New requests for it are answered 404. Requests under way end on it, then its memory is freed.
    """
    return await _withdraw(service.admin.unload(checked_reference(name)))


@admin.post("/adapters/{name}/pin")
async def pin(name: NamePath, service: ServiceOf) -> AdapterInfo:
    """Keep the name's adapter resident, also when the name changes, until it is unpinned or the server ends."""
    return describe_one(service, await service.admin.pin(checked_name(name)))


@admin.post("/adapters/{name}/unpin")
async def unpin(name: NamePath, service: ServiceOf) -> AdapterInfo:
    """Let an adapter be evicted again."""
    return describe_one(service, await service.admin.unpin(checked_name(name)))


async def _withdraw(withdrawing: Awaitable[Withdrawal]) -> JSONResponse:
    withdrawal = await withdrawing
    reply = WithdrawnReply(name=withdrawal.name, versions=list(withdrawal.versions), num_using=withdrawal.num_using)
    return JSONResponse(reply.model_dump(), 202 if withdrawal.num_using else 200)
