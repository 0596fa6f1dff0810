"""Gives the routes the service that the app was made with."""

from fastapi import Request

from server.service import Service


def get_service(request: Request) -> Service:
    """Returns the app's service."""
    service = request.state.service
    assert isinstance(service, Service)
    return service
