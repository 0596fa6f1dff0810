"""Authentication middleware: match every request to a caller, or refuse it, before its body is read.

Keys are never logged or quoted. Each request of a tenant is counted here by its headers, whatever its outcome.
"""

from collections.abc import Iterable, Mapping

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.caller import Caller
from server.access.key_ring import KeyRing
from server.access.limits import RateLimitedError, RateLimiter
from server.schemas.errors import error_reply
from server.transport.bodies import CLOSE

OPEN_PATHS = frozenset({"/", "/health", "/ping", "/ready", "/version", "/docs", "/openapi.json"})
STATIC_PREFIX = "/static/"
METRICS_PATH = "/metrics"
AUTHORIZATION = b"authorization"
OPEN_ROUTE_CALLER = Caller(allowed=())
"""The caller of a route that needs no key."""
KEYLESS_CALLER = Caller()
"""The caller of any route on a server without keys."""
SCRAPER_CALLER = Caller(allowed=(), is_monitor=True)
"""The caller of /metrics without a key, with --open-metrics."""
KEY_HINT = "send a key with the header 'Authorization: Bearer KEY'"


class Gate:
    """Authentication middleware: puts the caller into the request's state, or answers 401, or 429 if its tenant exceeds its rate.

    Without a key ring every request passes, with no rights. Without `rate` requests are not counted, because an ingress has
    counted them.
    """

    def __init__(
        self, app: ASGIApp, ring: KeyRing | None, rate: RateLimiter | None = None, *, opens_metrics: bool = False
    ) -> None:
        self._app, self._ring, self._rate, self._opens_metrics = app, ring, rate, opens_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
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
            # The application needs the key no more.
            headers = [(name, value) for name, value in scope["headers"] if name != AUTHORIZATION]
            await self._app({**scope, "headers": headers, "state": state}, receive, send)


def caller_of(scope: Scope, ring: KeyRing | None, *, opens_metrics: bool = False) -> Caller | JSONResponse:
    """Return the caller of a request, or the response that refuses it."""
    if ring is None:
        return KEYLESS_CALLER
    if is_open(scope["path"]):
        return OPEN_ROUTE_CALLER
    values = [value for name, value in scope["headers"] if name == AUTHORIZATION]
    if not values and opens_metrics and scope["path"] == METRICS_PATH:
        return SCRAPER_CALLER
    if not values:
        return _unauthorized(f"no key was sent: {KEY_HINT}")
    scheme, _, key = values[0].strip().partition(b" ")
    if len(values) > 1 or scheme.lower() != b"bearer" or not key.strip():
        return _unauthorized(f"the Authorization header is no key's: {KEY_HINT}")
    caller = ring.find(key.strip())
    if caller is None:
        return _unauthorized("the key is not known")
    if caller.is_monitor and not caller.is_admin and scope["path"] != METRICS_PATH:
        message = f"the key {caller.key_id!r} is of the role 'monitor', which reads {METRICS_PATH} alone"
        return JSONResponse(error_reply(403, "PermissionDeniedError", message, None), 403)
    return caller


def client_of(scope: Scope) -> str:
    """Return the client that a request's body counts for: its tenant, or its address if it has none."""
    caller = scope.get("state", {}).get("caller")
    if isinstance(caller, Caller) and caller.tenant:
        return f"tenant {caller.tenant}"
    return f"address {scope['client'][0] if scope.get('client') else ''}"


def rate_refusal(scope: Scope, caller: Caller, rate: RateLimiter) -> JSONResponse | None:
    """Count a request by its headers. Return the 429 response if it exceeds its tenant's rate, else None.

    A refused request is not counted. Its body is not read, so the connection ends if a body was announced.
    """
    try:
        rate.count(caller)
    except RateLimitedError as error:
        return rate_limited_reply(error, CLOSE if _has_body(scope["headers"]) else {})
    return None


def rate_limited_reply(error: RateLimitedError, headers: Mapping[str, str]) -> JSONResponse:
    """Return the 429 response for a request that exceeds its tenant's rate, with `headers` added."""
    content = error_reply(429, "RateLimitError", str(error), None)
    return JSONResponse(content, 429, {"Retry-After": str(error.retry_after_s), **headers})


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)


def is_open(path: str) -> bool:
    """Return whether the route at `path` needs no key."""
    return path in OPEN_PATHS or path.startswith(STATIC_PREFIX)


def _unauthorized(message: str) -> JSONResponse:
    return JSONResponse(error_reply(401, "AuthenticationError", message, None), 401, {"WWW-Authenticate": "Bearer"})
