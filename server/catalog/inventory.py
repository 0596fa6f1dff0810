"""The content of the stores at start: the adapters that can be served, and the damaged ones."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lori.basis import Explicit
from lori.config import ExplicitConfig
from lori.errors import AdapterFormatError, shortened, with_path
from lori.identity import BaseIdentity
from lori.printable import printable
from lori.store.entry import CachedEntry, Contents, Entry
from lori.store.store import AdapterStore
from lori.summary import Summary, summarise_sound
from server.catalog.files import without_paths
from server.engine.adapters.registry import Faulty

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
NOTHING = Contents({}, {})


@dataclass(frozen=True, slots=True)
class Inventory:
    """Adapters by name at start. A name is either sound or faulty."""

    entries: Mapping[str, Entry]
    summaries: Mapping[str, Summary]
    """Summaries of the sound adapters, by name."""
    faulty: Sequence[Faulty]
    bases: Sequence[Explicit]
    """The explicit bases of the sound adapters. As long as they are referenced here, no basis is read again."""


def take_inventory(
    own_store: AdapterStore | None, demo_store: AdapterStore | None, base: BaseIdentity, *, is_strict: bool
) -> Inventory:
    """Return the content of the server's own store and of the demo adapters, for `base`. Logs each damaged adapter.

    A name in the own store takes precedence over a demo adapter's name, even if its adapter is damaged. Raises
    `AdapterFormatError` with all faults if `is_strict` and an adapter is damaged, `AdapterError` if a store cannot be read as a
    whole, and `UnreachableError` if the basis of an adapter cannot be fetched.
    """
    own_contents, demo_contents = (store.contents() if store else NOTHING for store in (own_store, demo_store))
    entries = dict(sorted((_unshadowed(demo_contents.current, own_contents) | dict(own_contents.current)).items()))
    summaries, errors = summarise_sound(entries, base)
    bases = _bases(entries, summaries, errors)
    summaries = {name: summary for name, summary in summaries.items() if name not in errors}
    broken = _unshadowed(demo_contents.faults, own_contents) | dict(own_contents.faults)
    if is_strict and (errors or broken):
        faults = [
            f"{error.source}: {fault}" for name, error in errors.items() for fault in _with_paths(entries[name], error.faults)
        ]
        raise AdapterFormatError("what is to be served", [*faults, *broken.values()])
    _log(entries, errors, broken)
    faulty = [Faulty.from_faults(name, entries[name].folder.name, error.faults) for name, error in errors.items()]
    brief = {**demo_contents.brief, **own_contents.brief}
    faulty += [
        Faulty.from_faults(name, "", [brief.get(name) or without_paths(fault, own_store, demo_store)])
        for name, fault in broken.items()
    ]
    return Inventory(entries, summaries, faulty, bases)


def _with_paths(entry: Entry, faults: Sequence[str]) -> Sequence[str]:
    """Return faults with commands that the operator can type.

    Without paths for an adapter at an address: only its config is on this machine.
    """
    return faults if isinstance(entry, CachedEntry) else [with_path(fault, str(entry.folder)) for fault in faults]


def _unshadowed(demo_items: Mapping[str, Item], own_contents: Contents) -> dict[str, Item]:
    """Return the items of demo adapters whose names the server's own store does not have, sound or damaged."""
    taken = own_contents.current.keys() | own_contents.faults.keys()
    for name in sorted(demo_items.keys() & taken):
        logger.info("the demo adapter %r is not served: --adapters has one of this name", name)
    return {name: item for name, item in demo_items.items() if name not in taken}


def _bases(
    entries: Mapping[str, Entry], summaries: Mapping[str, Summary], errors: dict[str, AdapterFormatError]
) -> list[Explicit]:
    """Return the explicit bases of adapters. A damaged or missing basis is added to `errors` for its adapter."""
    bases: dict[str, Explicit] = {}
    for name, summary in summaries.items():
        if isinstance(summary.basis, ExplicitConfig) and summary.basis.digest not in bases:
            try:
                bases[summary.basis.digest] = entries[name].basis(summary.basis.digest)
            except AdapterFormatError as error:
                errors[name] = AdapterFormatError(str(entries[name].folder), error.faults)
    return [*bases.values()]


def _log(entries: Mapping[str, Entry], errors: Mapping[str, AdapterFormatError], broken: Mapping[str, str]) -> None:
    for name, error in errors.items():
        _log_one(name, f"{error.source}: {'; '.join(_with_paths(entries[name], error.shown))}")
    for name, fault in broken.items():
        _log_one(name, shortened(printable(fault)))
    if num_faulty := len(errors) + len(broken):
        logger.error(
            "%d of the adapters are damaged: GET /adapters lists them as faulty; --strict would end the start", num_faulty
        )


def _log_one(name: str, faults: str) -> None:
    logger.error("the adapter %r is damaged and NOT SERVED: %s", name, faults)
