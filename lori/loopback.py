"""Loopback addresses, which are always reached directly: a proxy on another machine would take them for its own loopback."""

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Return whether the `host` of a URL is this machine: localhost, a subdomain of localhost, a loopback or unspecified address.

    Servers print the unspecified addresses, 0.0.0.0 and ::, and a connection to them reaches this machine.
    """
    host = host.removesuffix(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def direct_mounts(url: str) -> dict[str, None]:
    """Return the `mounts` for httpx that bypass any HTTP_PROXY for `url`. Empty if `url` is on another machine."""
    host = (urlsplit(url).hostname or "").lower()
    if not is_loopback(host):
        return {}
    return {f"all://[{host}]" if ":" in host else f"all://{host}": None}
