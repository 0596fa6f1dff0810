"""The exposure of the server to other machines, and the check that nobody exposes it by mistake."""

import ipaddress
import logging
import socket

from server.settings import Settings

logger = logging.getLogger(__name__)


class ExposedError(Exception):
    """Other machines could use the server without a key, and the operator did not say that this is meant."""


def check_exposure(settings: Settings) -> None:
    """Raise `ExposedError` if other machines reach the server, it has no keys and --open was not given.

    Raises `OSError` if the host is neither an address nor a name.
    """
    if not (settings.keys or settings.open or is_local_only(settings.host)):
        raise ExposedError(
            f"--host: {settings.host!r} lets other machines in, and there are no keys; pass --keys FILE "
            "(`python -m server.keys FILE --tenant NAME` makes one), or --open where whoever reaches the port may use the server"
        )


def log_exposure(settings: Settings) -> None:
    """Log who may use the server."""
    if settings.keys:
        logger.info("served on %s to whoever has a key of %s", settings.host, settings.keys)
    elif is_local_only(settings.host):
        logger.info(
            "served on %s to whoever is on this machine, without keys (--keys): nobody may change adapters", settings.host
        )
    else:
        logger.warning(
            "OPEN: served on %s WITHOUT KEYS: whoever reaches the port may use every adapter, and read /metrics", settings.host
        )


def is_local_only(host: str) -> bool:
    """Return whether only this machine reaches `host`. Raises `OSError` if `host` is neither an address nor a name."""
    if not host:  # a listener takes "" for all addresses, but getaddrinfo does not
        return False
    addresses = {str(address[0]) for *_, address in socket.getaddrinfo(host, None)}
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)
