"""Who may not send a request is refused by its head, before the replicas, in the words of one server. Knows no Ray, no engine."""

import logging

from starlette.responses import JSONResponse
from starlette.types import Scope

from server.access.caller import Caller
from server.access.gate import caller_of
from server.access.hosts import AllowedHosts
from server.access.key_ring import KeyRing
from server.cluster.destination import is_change
from server.schemas.errors import error_reply
from server.transport.request_id import request_id

logger = logging.getLogger("server.request")
"""That of one server's request log."""
MAX_PATH = 200


def refusal_of(scope: Scope, keys: KeyRing | None, *, opens_metrics: bool, hosts: AllowedHosts | None) -> JSONResponse | None:
    """Returns what is answered to who has no key that counts, or would change adapters and is no admin; the log has a line of it.

    Likewise to a request for a name that is none of `hosts`. None where a replica is to be asked.
    """
    if hosts and (refusal := hosts.refusal(scope)):
        _log(scope, refusal.status_code, None)
        return refusal
    caller = caller_of(scope, keys, opens_metrics=opens_metrics)
    if isinstance(caller, JSONResponse):
        _log(scope, caller.status_code, None)
        return caller
    if caller.is_admin or not is_change(scope["method"], scope["path"]):
        return None
    _log(scope, 403, caller)
    return JSONResponse(error_reply(403, "PermissionDeniedError", _no_admin(caller, has_keys=keys is not None), None), 403)


def _no_admin(caller: Caller, *, has_keys: bool) -> str:
    # As `server.routes.dependencies.require_admin`, which needs torch; a test compares them.
    if not has_keys:
        return "this route needs an admin's key, and the server has no keys: it is to be started with --keys FILE"
    return f"this route needs a key of the role 'admin', and {caller.key_id!r} is one of tenant {caller.tenant!r}"


def _log(scope: Scope, status: int, caller: Caller | None) -> None:
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
    said = {name: value for name, value in fields.items() if value is not None}
    logger.info("%s %s %d", scope["method"], path, status, extra=said)
