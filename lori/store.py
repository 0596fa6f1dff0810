"""A folder of adapters: one folder each, its name the adapter's name. No path ever comes from a request."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lori.adapter import Adapter
from lori.errors import AdapterError, AdapterFormatError, UnknownAdapterError
from lori.format import CONFIG_FILE, load_adapter

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def adapter_folders(places: Iterable[Path]) -> dict[str, Path]:
    """Returns the adapters' folders by name over all `places`. A folder without an adapter's config is no adapter.

    Raises `AdapterError` where a place is no folder, a name is not a sound one, or two places hold the same name.
    """
    found: dict[str, Path] = {}
    for place in places:
        if not place.is_dir():
            raise AdapterError(f"{place} is no folder of adapters")
        for config in sorted(place.glob(f"[!.]*/{CONFIG_FILE}")):
            name = config.parent.name
            if not NAME.fullmatch(name):
                raise AdapterError(f"{config.parent}: an adapter's name must match {NAME.pattern}")
            if name in found:
                raise AdapterError(f"two adapters are called {name!r}: {found[name]} and {config.parent}")
            found[name] = config.parent
    return found


def load_all(folders: Mapping[str, Path], base_digest: str, shapes: Mapping[str, tuple[int, int]]) -> list[Adapter]:
    """Loads every adapter; raises one `AdapterFormatError` with the faults of all that are not sound."""
    adapters, faults = [], []
    for folder in folders.values():
        try:
            adapters.append(load_adapter(folder, base_digest, shapes))
        except AdapterFormatError as error:
            faults += [f"{error.source}: {fault}" for fault in error.faults]
    if faults:
        raise AdapterFormatError("the store of adapters", faults)
    return adapters


def unknown_adapter(name: str, known: Iterable[str]) -> UnknownAdapterError:
    """Returns the error for an unknown `name`, with the known names that look like it."""
    known = sorted(known)
    return UnknownAdapterError(name, difflib.get_close_matches(name, known, n=3, cutoff=0.5), known)
