"""The adapters of the stores that a server is started with, each under the name that it is asked for by."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from lori.adapter import Adapter
from lori.entry import Entry
from lori.errors import AdapterError, AdapterFormatError
from lori.identity import BaseIdentity
from lori.store import AdapterStore


def current_adapters(places: Iterable[Path]) -> dict[str, Entry]:
    """Returns what each name and alias means over the stores at `places`.

    Raises `AdapterError` as `AdapterStore.current` does, and where two stores hold the same name.
    """
    found: dict[str, Entry] = {}
    for place in places:
        for name, entry in AdapterStore(place).current().items():
            if name in found:
                raise AdapterError(f"two adapters are called {name!r}: {found[name].folder} and {entry.folder}")
            found[name] = entry
    return found


def load_all(entries: Mapping[str, Entry], base: BaseIdentity) -> list[Adapter]:
    """Loads every adapter; raises one `AdapterFormatError` with the faults of all that are not sound."""
    adapters, faults = [], []
    for entry in entries.values():
        try:
            adapters.append(entry.load(base))
        except AdapterFormatError as error:
            faults += [f"{error.source}: {fault}" for fault in error.faults]
    if faults:
        raise AdapterFormatError("what is to be served", faults)
    return adapters
