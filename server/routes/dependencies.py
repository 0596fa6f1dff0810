"""Dependencies of routes: the app's service, the caller, and checks of its role and of the query."""

from collections import Counter
from typing import Annotated

from fastapi import Depends, Request
from fastapi.routing import APIRoute

from server.access.caller import NO_KEYS, Caller, ForbiddenError
from server.engine.generate_request import RefusedError
from server.migration.suggestions import unknown_field
from server.service.service import Service


def get_service(request: Request) -> Service:
    """Return the app's service."""
    service = request.state.service
    assert isinstance(service, Service)
    return service


def get_caller(request: Request) -> Caller:
    """Return the caller of the request."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


ServiceOf = Annotated[Service, Depends(get_service)]
CallerOf = Annotated[Caller, Depends(get_caller)]


def require_admin(caller: CallerOf, service: ServiceOf) -> Caller:
    """Return the caller. Raises `ForbiddenError` if it may not change adapters."""
    if caller.is_admin:
        return caller
    if service.keys is None:
        raise ForbiddenError(NO_KEYS)
    raise ForbiddenError(f"this route needs a key of the role 'admin', and {caller.key_id!r} is one of tenant {caller.tenant!r}")


def require_monitor(caller: CallerOf, service: ServiceOf) -> Caller:
    """Return the caller. Raises `ForbiddenError` if it may not read the metrics. Without keys every caller may."""
    if service.keys is None or caller.is_monitor or caller.is_admin:
        return caller
    message = f"this route needs a key of the role 'monitor' or 'admin', and {caller.key_id!r} is one of tenant {caller.tenant!r}"
    raise ForbiddenError(message)


def check_query(request: Request) -> None:
    """Raise `RefusedError` for a query field that the route does not have, or that is given more than once."""
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    known = frozenset(param.alias for param in route.dependant.query_params)
    for field, count in Counter(field for field, _ in request.query_params.multi_items()).items():
        if field not in known:
            raise RefusedError(field, unknown_field(field, known))
        if count > 1:
            raise RefusedError(field, f"is given {count} times, expected once")
