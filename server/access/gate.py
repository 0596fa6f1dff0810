"""Authentication: every request is matched to a caller before its body is read, or refused. Keys are never logged or quoted.

Each request of a tenant is counted here, by its head, whatever becomes of it.
"""

from collections.abc import Iterable, Mapping

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.caller import Caller
from server.access.key_ring import KeyRing
from server.access.limits import RateLimitedError, RateLimiter
from server.schemas.errors import error_reply
from server.transport.bodies import CLOSE

OPEN = frozenset({"/", "/health", "/ping", "/ready", "/version", "/docs", "/openapi.json"})
STATIC = "/static/"
MONITORED = "/metrics"
HEADER = b"authorization"
NOBODY = Caller(allowed=())
"""Who asks for an open route: no matter who."""
ANYBODY = Caller()
"""Who sends a request to a server without keys."""
SCRAPER = Caller(allowed=(), is_monitor=True)
"""Who reads the metrics without a key, where that is allowed."""
ASKED = "send a key with the header 'Authorization: Bearer KEY'"


class Gate:
    """Puts the caller into the request's state, or answers 401, or 429 to a tenant that has used up its rate.

    Without a key ring everybody may pass, with no rights. Without `rate` requests are not counted: an ingress has done it.
    """

    def __init__(
        self, app: ASGIApp, ring: KeyRing | None, rate: RateLimiter | None = None, *, opens_metrics: bool = False
    ) -> None:
        self._app, self._ring, self._rate, self._opens_metrics = app, ring, rate, opens_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or not."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif isinstance(caller := caller_of(scope, self._ring, opens_metrics=self._opens_metrics), JSONResponse):
            await caller(scope, receive, send)
        elif self._rate and (refusal := rate_refusal(scope, caller, self._rate)):
            scope.setdefault("state", {})["caller"] = caller  # for the log's line
            await refusal(scope, receive, send)
        else:
            state = {**scope.get("state", {}), "caller": caller}
            # The key has done its work.
            headers = [(name, value) for name, value in scope["headers"] if name != HEADER]
            await self._app({**scope, "headers": headers, "state": state}, receive, send)


def caller_of(scope: Scope, ring: KeyRing | None, *, opens_metrics: bool = False) -> Caller | JSONResponse:
    """Return who sends a request, or what he is answered who may not."""
    if ring is None:
        return ANYBODY
    if is_open(scope["path"]):
        return NOBODY
    found = [value for name, value in scope["headers"] if name == HEADER]
    if not found and opens_metrics and scope["path"] == MONITORED:
        return SCRAPER
    if not found:
        return _unknown(f"no key was sent: {ASKED}")
    scheme, _, key = found[0].strip().partition(b" ")
    if len(found) > 1 or scheme.lower() != b"bearer" or not key.strip():
        return _unknown(f"the Authorization header is no key's: {ASKED}")
    caller = ring.find(key.strip())
    if caller is None:
        return _unknown("the key is not known")
    if caller.is_monitor and not caller.is_admin and scope["path"] != MONITORED:
        said = f"the key {caller.key_id!r} is of the role 'monitor', which reads {MONITORED} alone"
        return JSONResponse(error_reply(403, "PermissionDeniedError", said, None), 403)
    return caller


def rate_refusal(scope: Scope, caller: Caller, rate: RateLimiter) -> JSONResponse | None:
    """Count a request by its head. Return the answer to one that exceeds its tenant's rate, which is not counted; else None.

    Its body is not read: where one was announced, the connection ends.
    """
    try:
        rate.count(caller)
    except RateLimitedError as error:
        return rate_limited_reply(error, CLOSE if _has_body(scope["headers"]) else {})
    return None


def rate_limited_reply(error: RateLimitedError, headers: Mapping[str, str]) -> JSONResponse:
    """Return the answer to a request that exceeds its tenant's rate, with more `headers`."""
    content = error_reply(429, "RateLimitError", str(error), None)
    return JSONResponse(content, 429, {"Retry-After": str(error.retry_after_s), **headers})


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)


def is_open(path: str) -> bool:
    """Return whether a route needs no key."""
    return path in OPEN or path.startswith(STATIC)


def _unknown(message: str) -> JSONResponse:
    return JSONResponse(error_reply(401, "AuthenticationError", message, None), 401, {"WWW-Authenticate": "Bearer"})
