"""What the stores hold at start: the adapters that can be served, and those that are damaged."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lori.basis import Explicit
from lori.config import ExplicitConfig
from lori.errors import AdapterFormatError, placed, shortened
from lori.identity import BaseIdentity
from lori.printable import printable
from lori.store.entry import CachedEntry, Entry
from lori.store.store import AdapterStore, Contents
from lori.summary import Summary, summarise_sound
from server.catalog.files import without_paths
from server.engine.adapters.registry import Faulty

logger = logging.getLogger(__name__)
Shown = TypeVar("Shown")
NOTHING = Contents({}, {})


@dataclass(frozen=True, slots=True)
class Inventory:
    """What names mean at start. A name is among the sound or the faulty, never among both."""

    entries: Mapping[str, Entry]
    summaries: Mapping[str, Summary]
    """Of the sound ones, by name."""
    faulty: Sequence[Faulty]
    bases: Sequence[Explicit]
    """The explicit bases of the sound ones; as long as they are kept here, none is read again."""


def take_inventory(own: AdapterStore | None, demo: AdapterStore | None, base: BaseIdentity, *, is_strict: bool) -> Inventory:
    """Return what the server's own store and the demo adapters hold, for `base`; the log has a line for each that is damaged.

    An own name comes before a demo adapter's, also where what it means is damaged. Raises `AdapterFormatError` with the faults of
    all where `is_strict` and some are damaged; `AdapterError` where a store cannot be read as a whole, `UnreachableError` where
    the basis of an adapter does not come.
    """
    ours, shown = (store.contents() if store else NOTHING for store in (own, demo))
    entries = dict(sorted((_shadowed(shown.current, ours) | dict(ours.current)).items()))
    summaries, errors = summarise_sound(entries, base)
    bases = _bases(entries, summaries, errors)
    summaries = {name: summary for name, summary in summaries.items() if name not in errors}
    nameless = _shadowed(shown.faults, ours) | dict(ours.faults)
    if is_strict and (errors or nameless):
        faults = [f"{error.source}: {fault}" for name, error in errors.items() for fault in _typed(entries[name], error.faults)]
        raise AdapterFormatError("what is to be served", [*faults, *nameless.values()])
    _log(entries, errors, nameless)
    faulty = [Faulty.of(name, entries[name].folder.name, error.faults) for name, error in errors.items()]
    brief = {**shown.brief, **ours.brief}
    faulty += [Faulty.of(name, "", [brief.get(name) or without_paths(fault, own, demo)]) for name, fault in nameless.items()]
    return Inventory(entries, summaries, faulty, bases)


def _typed(entry: Entry, faults: Sequence[str]) -> Sequence[str]:
    """Return faults as the operator may type what they say: of an adapter at an address only a copy of its config is here."""
    return faults if isinstance(entry, CachedEntry) else [placed(fault, str(entry.folder)) for fault in faults]


def _shadowed(shown: Mapping[str, Shown], ours: Contents) -> dict[str, Shown]:
    """Return what is `shown` of demo adapters, but for the names that the server's own store has, sound or not."""
    taken = ours.current.keys() | ours.faults.keys()
    for name in sorted(shown.keys() & taken):
        logger.info("the demo adapter %r is not served: --adapters has one of this name", name)
    return {name: one for name, one in shown.items() if name not in taken}


def _bases(
    entries: Mapping[str, Entry], summaries: Mapping[str, Summary], errors: dict[str, AdapterFormatError]
) -> list[Explicit]:
    """Return the explicit bases of adapters; of an adapter whose basis is damaged or missing, that is added to `errors`."""
    bases: dict[str, Explicit] = {}
    for name, summary in summaries.items():
        if isinstance(summary.basis, ExplicitConfig) and summary.basis.digest not in bases:
            try:
                bases[summary.basis.digest] = entries[name].basis(summary.basis.digest)
            except AdapterFormatError as error:
                errors[name] = AdapterFormatError(str(entries[name].folder), error.faults)
    return [*bases.values()]


def _log(entries: Mapping[str, Entry], errors: Mapping[str, AdapterFormatError], nameless: Mapping[str, str]) -> None:
    for name, error in errors.items():
        _log_one(name, f"{error.source}: {'; '.join(_typed(entries[name], error.shown))}")
    for name, fault in nameless.items():
        _log_one(name, shortened(printable(fault)))
    if num_faulty := len(errors) + len(nameless):
        logger.error(
            "%d of the adapters are damaged: GET /adapters lists them as faulty; --strict would end the start", num_faulty
        )


def _log_one(name: str, faults: str) -> None:
    logger.error("the adapter %r is damaged and NOT SERVED: %s", name, faults)
