"""Host names of a server without keys. Requests for other names are refused before a byte of the body is read.

A web page can make its own name resolve to this machine's address (DNS rebinding). A browser then takes the server for a part of
that page, and lets the page read all answers. Such requests carry the page's name in their Host header. IP addresses pass,
because no such name looks like one. A server with keys needs no such check, because a page has no key.
"""

import re
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.schemas.errors import error_reply
from server.settings import Settings

ANY = "*"
LOCAL = ("localhost", "*.localhost")
"""Names that browsers never look up in DNS (RFC 6761, section 6.3)."""
AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::\d*)?")
"""A name or an address, with an optional port."""
MAX_SHOWN = 64


class AllowedHosts:
    """Allowed host names: plain names, `*.NAME` for all names below NAME, or `*` for all names."""

    def __init__(self, names: Iterable[str]) -> None:
        plain = [_plain(name) for name in (*LOCAL, *names)]
        self._allows_any = ANY in plain
        self._names = frozenset(plain)
        self._endings = tuple(name[1:] for name in plain if name.startswith("*."))

    @classmethod
    def from_settings(cls, settings: Settings) -> "AllowedHosts":
        """Return the names that the operator gives: --allow-host, and the --host that the server listens on."""
        return cls([*settings.allow_host, settings.host])

    def includes(self, host: str) -> bool:
        """Return whether a Host header may have this value: an allowed name or any IP address, with any port, or nothing."""
        if self._allows_any or not host:
            return True
        parts = AUTHORITY.fullmatch(host)
        if not parts:
            return False
        name = _plain(parts[1])
        return name in self._names or name.endswith(self._endings) or _is_address(name)

    def refusal(self, scope: Scope) -> JSONResponse | None:
        """Return the 421 response to a request for a name that is not allowed, or None.

        A request without a Host header, as HTTP/1.0 allows, passes: no browser sends one.
        """
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        wrong = next((host for host in hosts if not self.includes(host)), None)
        if wrong is None:
            return None
        message = (
            f"Host is {wrong[:MAX_SHOWN]!r}, expected localhost, an IP address, or a name that the server is started with "
            "(--allow-host): without keys it answers to no other"
        )
        return JSONResponse(error_reply(421, "BadRequestError", message, None), 421, {"Connection": "close"})


class HostCheck:
    """Middleware that answers 421 to requests for host names that are not allowed.

    The connection ends, because the body is not read.
    """

    def __init__(self, app: ASGIApp, hosts: AllowedHosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        refusal = self._hosts.refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)


def _plain(name: str) -> str:
    # DNS ignores case, and a name may end with the root's dot.
    return name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        if name.startswith("["):
            IPv6Address(name[1:-1])
        else:
            return ip_address(name).version == 4
    except ValueError:
        return False
    return True
