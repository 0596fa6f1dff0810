"""Gives the routes the service that the app was made with, and who asks."""

from typing import Annotated

from fastapi import Depends, Request

from server.access.caller import Caller, ForbiddenError
from server.service import Service


def get_service(request: Request) -> Service:
    """Returns the app's service."""
    service = request.state.service
    assert isinstance(service, Service)
    return service


def get_caller() -> Caller:
    """Returns who sends the request."""
    return Caller()


ServiceOf = Annotated[Service, Depends(get_service)]
CallerOf = Annotated[Caller, Depends(get_caller)]


def require_admin(caller: CallerOf) -> Caller:
    """Returns who sends the request. Raises `ForbiddenError` where he may not change adapters."""
    if caller.is_admin:
        return caller
    raise ForbiddenError("this route needs an admin's key, and the server has no keys: it is to be started with --keys FILE")
