"""The adapter stores that the settings name: the server's own store (a folder or an address), and the demo adapters."""

import hashlib
from pathlib import Path

from lori.embedded import cache_dir
from lori.errors import AdapterError, UnreachableError
from lori.store.remote import RemoteStore
from lori.store.remote_folder import RemoteFolder, is_url, redacted
from lori.store.store import AdapterStore
from server.settings import GIB, Settings

DEMO_ADAPTERS = Path(__file__).parents[1] / "adapters"
NUM_DIGITS = 16
"""Hexadecimal digits of the digest of an address, which names its cache folder."""


def open_stores(settings: Settings) -> tuple[AdapterStore | None, AdapterStore | None]:
    """Return the server's own store and the store of demo adapters. Raises `AdapterError` if the own store cannot be read."""
    has_demo = settings.demo_adapters and settings.model is None
    return _own_store(settings), AdapterStore(DEMO_ADAPTERS) if has_demo else None


def _own_store(settings: Settings) -> AdapterStore | None:
    address = settings.adapters
    if address is None:
        return None
    if not is_url(address):
        return AdapterStore(Path(address))
    cache = (settings.adapter_cache or cache_dir() / "adapters") / hashlib.sha256(address.encode()).hexdigest()[:NUM_DIGITS]
    try:
        remote = RemoteFolder(address, settings.adapter_timeout_s)
        return RemoteStore(remote, cache, int(settings.adapter_cache_gib * GIB), settings.delete_grace_s)
    except AdapterError as error:
        message = str(error)
        if isinstance(error, UnreachableError) and str(error.__cause__):
            message = f"{message}: {redacted(' '.join(str(error.__cause__).split()))}"
        raise AdapterError(f"--adapters {redacted(address)}: {message}") from error
