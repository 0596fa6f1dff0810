"""Addresses of this machine, which are never asked through a proxy: a proxy elsewhere would take them for its own."""

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Say whether `host`, as a URL has it, is this machine: localhost, a name below it, or a loopback address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def direct_mounts(url: str) -> dict[str, None]:
    """Return the `mounts` with which httpx asks `url` directly, whatever HTTP_PROXY says; none where it is another machine."""
    host = (urlsplit(url).hostname or "").lower()
    if not is_loopback(host):
        return {}
    return {f"all://[{host}]" if ":" in host else f"all://{host}": None}
