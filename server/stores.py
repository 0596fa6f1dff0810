"""The stores of adapters that the settings name: the server's own, a folder or an address, and the demo adapters."""

import hashlib
from pathlib import Path

from lori.embedded import cache_dir
from lori.errors import AdapterError, UnreachableError
from lori.store.remote import RemoteStore
from lori.store.remote_folder import RemoteFolder, is_url, redacted
from lori.store.store import AdapterStore
from server.settings import Settings

DEMO_ADAPTERS = Path(__file__).parent / "adapters"
GIB = 2**30
NUM_DIGITS = 16
"""Of a digest of an address, which names the cache of what lies there."""


def open_stores(settings: Settings) -> tuple[AdapterStore | None, AdapterStore | None]:
    """Return the server's own store, and the one of demo adapters. Raises `AdapterError` where the own cannot be looked at."""
    has_demo = settings.demo_adapters and settings.model is None
    return _own(settings), AdapterStore(DEMO_ADAPTERS) if has_demo else None


def _own(settings: Settings) -> AdapterStore | None:
    place = settings.adapters
    if place is None:
        return None
    if not is_url(place):
        return AdapterStore(Path(place))
    cache = (settings.adapter_cache or cache_dir() / "adapters") / hashlib.sha256(place.encode()).hexdigest()[:NUM_DIGITS]
    try:
        remote = RemoteFolder(place, settings.adapter_timeout_s)
        return RemoteStore(remote, cache, int(settings.adapter_cache_gib * GIB), settings.delete_grace_s)
    except AdapterError as error:
        said = str(error)
        if isinstance(error, UnreachableError) and str(error.__cause__):
            said = f"{said}: {redacted(' '.join(str(error.__cause__).split()))}"
        raise AdapterError(f"--adapters {redacted(place)}: {said}") from error
