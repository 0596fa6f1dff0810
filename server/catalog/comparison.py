"""How adapters of the server relate, pair by pair: read from disk, compared beside the engine, and remembered.

Knows nothing of HTTP. Runs in whatever thread calls it, one at a time.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

from lori.adapter import Adapter
from lori.compare.pairs import ModuleComparison, compare_pairs
from lori.errors import AdapterError, AdapterFormatError, LoriError
from server.engine.adapters.registry import Registered

MAX_PAIRS = 8192
"""That are remembered: a few numbers each."""


class Comparer:
    """Compares adapters, each pair of contents once as long as it is remembered.

    Between two modules it rests as long as the last one took, so it asks for half a core: requests that are being answered come
    first. Holds the weights of all that it compares, not those of pairs that it remembers. No two threads may call it at once.
    """

    def __init__(
        self,
        max_pairs: int = MAX_PAIRS,
        rest: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._max_pairs, self._rest, self._clock = max_pairs, rest, clock
        self._known: OrderedDict[tuple[str, str], ModuleComparison] = OrderedDict()
        """By digests, the smaller one first; those asked for last are last."""

    def compare(self, asked: Sequence[Registered]) -> list[list[ModuleComparison]]:
        """Return the comparison of each with each, itself too, both ways round the same but for what is of a and b.

        Raises `AdapterError` where one cannot be read, or was changed since the server read its summary.
        """
        by_digest = {of.summary.digest: of for of in asked}
        pairs = list(combinations_with_replacement(sorted(by_digest), 2))
        self._learn([pair for pair in pairs if pair not in self._known], by_digest)
        for pair in pairs:
            self._known.move_to_end(pair)
        digests = [of.summary.digest for of in asked]
        table = [[self._known[min(a, b), max(a, b)] for b in digests] for a in digests]
        while len(self._known) > self._max_pairs:
            self._known.popitem(last=False)
        return table

    def _learn(self, pairs: Sequence[tuple[str, str]], by_digest: dict[str, Registered]) -> None:
        if not pairs:
            return
        digests = sorted({digest for pair in pairs for digest in pair})
        adapters = [_read(by_digest[digest]) for digest in digests]
        places = [(digests.index(a), digests.index(b)) for a, b in pairs]
        started = self._clock()

        def rest() -> None:
            nonlocal started
            self._rest(self._clock() - started)
            started = self._clock()

        self._known.update(zip(pairs, compare_pairs(adapters, places, rest), strict=True))


def _read(of: Registered) -> Adapter:
    name, expected = of.summary.name, of.summary.digest
    *_, entry = of.entries()
    try:
        adapter = entry.load()
    except (LoriError, OSError, ValueError) as error:  # whatever a file holds
        raise AdapterError(f"adapter {name!r} cannot be read: {_said(error)}") from error
    found = adapter.config.lori.content_digest
    if found != expected:
        raise AdapterError(f"adapter {name!r} was changed on disk: its digest is {found}, expected {expected}")
    return adapter


def _said(error: Exception) -> str:
    # A client is told the faults, not where the file lies.
    if isinstance(error, AdapterFormatError):
        return "; ".join(error.shown)
    return error.strerror or "the system refuses" if isinstance(error, OSError) else str(error)
