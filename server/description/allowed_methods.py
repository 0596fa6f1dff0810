"""Which methods a path has: RFC 9110, section 15.5.6, wants all of them said to who used another."""

from fastapi import Request
from starlette.routing import Match

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def allowed_methods(request: Request) -> list[str]:
    """Returns the methods of the request's path. The framework knows those of one route alone, and a path can have several."""
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    return [method for method, scope in scopes.items() if any(of.matches(scope)[0] is Match.FULL for of in request.app.routes)]
