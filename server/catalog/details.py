"""What the whole of an adapter says: its card and its modules. Runs in whatever thread calls it."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lori.compare.statistics import ModuleStatistics, statistics
from lori.errors import AdapterFormatError
from lori.format import read_config
from lori.identity import BaseIdentity
from lori.store.entry import Entry
from server.catalog.store_errors import told
from server.engine.adapters.loader import REMEDY
from server.engine.adapters.registry import Registered

MAX_REMEMBERED = 64
"""Adapters whose statistics are remembered."""


@dataclass(frozen=True, slots=True)
class Details:
    """What is read of an adapter for a person."""

    card: str
    """Markdown; empty where there is none."""
    modules: Sequence[ModuleStatistics]


class AdapterDetails:
    """Reads adapters of `base` and remembers what it computed of them; for one thread at a time.

    Between two modules it rests as long as the last one took: requests that are being answered come first.
    """

    def __init__(self, base: BaseIdentity, rest: Callable[[float], None] = time.sleep) -> None:
        self._base, self._rest = base, rest
        self._known: OrderedDict[str, Sequence[ModuleStatistics]] = OrderedDict()  # those asked for last are last

    def read(self, of: Registered) -> Details:
        """Returns the details. Raises `AdapterFormatError`, `ConflictError` or `StoreError` where it cannot be read any more."""
        *_, entry = of.entries()
        with told():
            _check_same(read_config(entry.folder).lori.content_digest, entry, of.summary.digest)
            return Details(entry.card().decode(errors="replace"), self._statistics(entry, of.summary.digest))

    def _statistics(self, entry: Entry, digest: str) -> Sequence[ModuleStatistics]:
        if digest not in self._known:
            self._known[digest] = self._compute(entry, digest)
        self._known.move_to_end(digest)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return self._known[digest]

    def _compute(self, entry: Entry, digest: str) -> Sequence[ModuleStatistics]:
        adapter = entry.load(self._base)
        _check_same(adapter.config.lori.content_digest, entry, digest)
        since = time.perf_counter()

        def rest() -> None:
            nonlocal since
            self._rest(time.perf_counter() - since)
            since = time.perf_counter()

        return statistics(adapter, rest)


def _check_same(found: str, entry: Entry, expected: str) -> None:
    if found != expected:
        raise AdapterFormatError(entry.name, [f"it was changed on disk since the server read of it: {REMEDY}"])
