"""Refusals at the ingress: host, key, rate and role are checked by a request's headers, before a replica sees it.

The answers are those of a single server. Tenants' requests are counted here, and by no replica. Knows no Ray, no engine.
"""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from server.access.caller import NO_KEYS, Caller
from server.access.gate import caller_of, rate_limited_reply, rate_refusal
from server.access.hosts import AllowedHosts
from server.access.key_ring import KeyRing
from server.access.limits import RateLimitedError, RateLimiter
from server.cluster.destination import COMPLETIONS_PATH, Fields, is_change, num_prompts
from server.schemas.errors import error_reply
from server.transport.request_id import request_id

logger = logging.getLogger("server.request")
"""The logger of a single server's request log."""
MAX_PATH = 200


def checked_caller(
    scope: Scope, keys: KeyRing | None, rate: RateLimiter, *, opens_metrics: bool, hosts: AllowedHosts | None = None
) -> Caller | JSONResponse:
    """Count a request by its headers. Return its caller, or the response that refuses it, which is logged.

    Refused are requests for a name that is not in `hosts`, without a valid key, above their tenant's rate, and changes of
    adapters without an admin's key.
    """
    if hosts and (misdirected := hosts.refusal(scope)):
        _log(scope, misdirected.status_code, None)
        return misdirected
    caller = caller_of(scope, keys, opens_metrics=opens_metrics)
    if isinstance(caller, JSONResponse):
        _log(scope, caller.status_code, None)
        return caller
    refusal = rate_refusal(scope, caller, rate)
    if refusal is None and is_change(scope["method"], scope["path"]) and not caller.is_admin:
        message = _not_admin(caller, has_keys=keys is not None)
        refusal = JSONResponse(error_reply(403, "PermissionDeniedError", message, None), 403)
    if refusal is None:
        return caller
    _log(scope, refusal.status_code, caller)
    return refusal


def batch_refusal(scope: Mapping[str, Any], caller: Caller, rate: RateLimiter, fields: Fields) -> JSONResponse | None:
    """Count the prompts of a batch but the first, which was counted with the headers.

    Return the response that refuses the batch if its prompts exceed the tenant's rate, else None. A batch that could never be
    sent at once is left for a replica to refuse.
    """
    limit = rate.limit(caller)
    if limit is None or scope["path"] != COMPLETIONS_PATH or (number := num_prompts(fields)) > limit:
        return None
    try:
        rate.count(caller, number - 1)
    except RateLimitedError as error:
        _log(scope, 429, caller)
        return rate_limited_reply(error, {})
    return None


def _not_admin(caller: Caller, *, has_keys: bool) -> str:
    # The text of `server.routes.dependencies.require_admin`, which needs torch; a test compares them.
    if not has_keys:
        return NO_KEYS
    return f"this route needs a key of the role 'admin', and {caller.key_id!r} is one of tenant {caller.tenant!r}"


def _log(scope: Mapping[str, Any], status: int, caller: Caller | None) -> None:
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:MAX_PATH]
    fields = {
        "request_id": request_id(scope["headers"]),
        "method": scope["method"],
        "route": path,
        "status": status,
        "client": scope["client"][0] if scope.get("client") else None,
        "tenant": caller.tenant or None if caller else None,
        "key_id": caller.key_id or None if caller else None,
    }
    extra = {name: value for name, value in fields.items() if value is not None}
    logger.info("%s %s %d", scope["method"], path, status, extra=extra)
