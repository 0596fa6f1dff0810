"""Routes that show and change named merges. `GET /adapters` lists them. They only translate."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from lori.named_merge import NamedMerge
from lori.names import NAME
from server.description.responses import refusals
from server.errors import UnknownMergeError
from server.routes.adapter_rows import describe_merge
from server.routes.dependencies import CallerOf, ServiceOf, require_admin
from server.routes.json_route import JsonRoute
from server.routes.uploads import checked_name
from server.schemas.adapters import NamedMergeInfo

router = APIRouter()
admin = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_admin)])
MergePath = Annotated[str, Path(description="A merge's name.", json_schema_extra={"pattern": f"^{NAME.pattern}$"})]


@router.get("/merges/{name}", responses=refusals(404))
async def show_merge(name: MergePath, service: ServiceOf, caller: CallerOf) -> NamedMergeInfo:
    """Show a named merge."""
    if merge := service.merges.find(name, caller.may_use):
        return describe_merge(service, name, merge)
    raise UnknownMergeError(f"there is no merge {name!r}")


@admin.put("/merges/{name}")
async def publish_merge(name: MergePath, merge: NamedMerge, service: ServiceOf) -> NamedMergeInfo:
    """Publish a named merge: the content of a file as `python -m training.tune` writes it, in place of one of the same name.

    Requests under way end with the weights that they began with.
    """
    await service.merge_admin.publish(checked_name(name), merge)
    return describe_merge(service, name, merge)


@admin.delete("/merges/{name}")
async def delete_merge(name: MergePath, service: ServiceOf) -> NamedMergeInfo:
    """Delete a named merge with its file. The reply is what it was. Its adapters stay."""
    return describe_merge(service, name, await service.merge_admin.delete(checked_name(name)))
