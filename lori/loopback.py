"""Addresses of this machine, which are never asked through a proxy: a proxy elsewhere would take them for its own."""

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Say whether `host`, as a URL has it, is this machine: localhost, a subdomain of it, a loopback or an unspecified address.

    Servers print the unspecified ones, 0.0.0.0 and ::, and a connection to them reaches this machine.
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
    """Return the `mounts` with which httpx asks `url` directly, whatever HTTP_PROXY says; none where it is another machine."""
    host = (urlsplit(url).hostname or "").lower()
    if not is_loopback(host):
        return {}
    return {f"all://[{host}]" if ":" in host else f"all://{host}": None}
