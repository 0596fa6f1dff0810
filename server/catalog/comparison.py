"""Comparisons of the server's adapters, beside the engine: of their weights, pair by pair, read from disk and cached; and of
their prompts, by their statistics.

Knows nothing of HTTP. Runs in the calling thread, one comparison at a time.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

from lori.adapter import Adapter
from lori.auto_weights import mean_weights
from lori.compare.pairs import ModuleComparison, compare_pairs
from lori.errors import AdapterError, AdapterFormatError, LoriError
from lori.prompt_statistics import Background, PromptStatistics
from server.engine.adapters.registry import Registered

MAX_PAIRS = 8192
"""Pairs that are cached. Each is a few numbers."""


class Comparer:
    """Compares adapters. Caches comparisons of weights by pairs of adapter contents.

    Between two modules or rows it sleeps as long as the last one took, so it uses half a core: requests that are being answered
    come first. A comparison holds the weights of the adapters that it reads, but not those of cached pairs. Not thread-safe.
    """

    def __init__(
        self,
        max_pairs: int = MAX_PAIRS,
        rest: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._max_pairs, self._rest, self._clock = max_pairs, rest, clock
        self._cache: OrderedDict[tuple[str, str], ModuleComparison] = OrderedDict()
        """Comparisons by digests, the smaller one first. The most recently used are last."""

    def compare(self, adapters: Sequence[Registered]) -> list[list[ModuleComparison]]:
        """Return the comparison of each adapter with each, itself too. Both ways round are the same but for figures of a and b.

        Raises `AdapterError` if an adapter cannot be read, or has changed since the server read its summary.
        """
        by_digest = {adapter.summary.digest: adapter for adapter in adapters}
        pairs = list(combinations_with_replacement(sorted(by_digest), 2))
        self._compute([pair for pair in pairs if pair not in self._cache], by_digest)
        for pair in pairs:
            self._cache.move_to_end(pair)
        digests = [adapter.summary.digest for adapter in adapters]
        table = [[self._cache[min(a, b), max(a, b)] for b in digests] for a in digests]
        while len(self._cache) > self._max_pairs:
            self._cache.popitem(last=False)
        return table

    def auto_weights(
        self, background: Background | None, adapters: Sequence[PromptStatistics | None]
    ) -> list[list[float | None]]:
        """Return, for prompts of each adapter (row), the mean automatic weight of each (column).

        All adapters with statistics are named together; None for the others. See `lori.auto_weights.mean_weights`.
        """
        table: list[list[float | None]] = [[None] * len(adapters) for _ in adapters]
        if background is None:
            return table
        places = {place: statistics for place, statistics in enumerate(adapters) if statistics}
        for row, prompts in places.items():
            started = self._clock()
            weights = mean_weights(background, [*places.values()], prompts).tolist()
            for column, weight in zip(places, weights, strict=True):
                table[row][column] = weight
            self._rest(self._clock() - started)
        return table

    def _compute(self, pairs: Sequence[tuple[str, str]], by_digest: dict[str, Registered]) -> None:
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

        self._cache.update(zip(pairs, compare_pairs(adapters, places, rest), strict=True))


def _read(adapter: Registered) -> Adapter:
    name, expected = adapter.summary.name, adapter.summary.digest
    *_, entry = adapter.entries()
    try:
        loaded = entry.load()
    except (LoriError, OSError, ValueError) as error:  # a damaged file may raise any of these
        raise AdapterError(f"adapter {name!r} cannot be read: {_fault(error)}") from error
    digest = loaded.config.lori.content_digest
    if digest != expected:
        raise AdapterError(f"adapter {name!r} was changed on disk: its digest is {digest}, expected {expected}")
    return loaded


def _fault(error: Exception) -> str:
    # A client sees the faults, but not the path of the file.
    if isinstance(error, AdapterFormatError):
        return "; ".join(error.shown)
    return error.strerror or "the system refuses" if isinstance(error, OSError) else str(error)
