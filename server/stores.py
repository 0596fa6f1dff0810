"""The adapters that a server is started with, each under the name that it is asked for by."""

from collections.abc import Mapping

from lori.adapter import Adapter
from lori.entry import Entry
from lori.errors import AdapterFormatError
from lori.identity import BaseIdentity


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
