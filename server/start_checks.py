"""Checks before a server or a cluster starts. They need no torch, whose import takes seconds, so faults are reported at once."""

from server.access.exposure import check_exposure
from server.access.keys import read_keys
from server.settings import Settings
from server.transport.sockets import ListenError, check_port


def check_start(settings: Settings) -> None:
    """Raise `ExposedError`, `ListenError` or `KeyFileError` if the address or the key file cannot be used."""
    try:
        check_exposure(settings)
        check_port(settings.host, settings.port)
    except OSError as error:
        raise ListenError(settings.host, settings.port, error) from error
    if settings.keys:
        read_keys(settings.keys)
