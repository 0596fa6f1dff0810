"""Faults of rows, counted by kind, with the origins of the rows. Knows nothing of files or tokens.

One `Faults` collects the faults of all sources of a run, so that they are reported together.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from lori.errors import LoriError

logger = logging.getLogger(__name__)

OnBad = Literal["refuse", "skip"]
Kind = Literal[
    "not UTF-8", "not JSON", "not an object", "missing field", "wrong type", "wrong value", "two forms", "source template fails",
    "empty prompt", "no completion", "empty completion", "too long", "chat template refuses", "nothing to predict",
]  # fmt: skip
JSON_LINES = "Expected a JSON object on each line (JSON Lines); a JSON array or a CSV file is to be rewritten so."
HINTS: Mapping[Kind, str] = {"not JSON": JSON_LINES, "not an object": JSON_LINES}
NUM_SHOWN = 10
"""Maximum number of rows of a kind that a message lists. The others are counted only."""
MAX_DETAIL = 200
"""Maximum characters of a fault's detail in a message: an error of a template has no bound of its own."""


class DataError(LoriError):
    """Data that cannot be used. The message says the file and line, what was found and what was expected."""


@dataclass(slots=True)
class _Occurrences:
    count: int = 0
    shown: list[tuple[str, str]] = field(default_factory=list)
    """(origin, detail) of the first `NUM_SHOWN` occurrences."""

    @property
    def num_more(self) -> int:
        return self.count - len(self.shown)


class Faults:
    """Collector of the faults of rows. `raise_or_warn` then raises an error with them, or warns that the rows were left out."""

    def __init__(self, on_bad: OnBad = "refuse", can_skip: bool = True) -> None:
        """Create an empty collector. `can_skip`: the program has the flag `--on-bad`, which the error message then mentions."""
        self._on_bad, self._can_skip = on_bad, can_skip
        self._counts: Counter[str] = Counter()
        self._unreported: dict[Kind, _Occurrences] = {}
        self._hints: list[str] = []

    @property
    def counts(self) -> dict[str, int]:
        """Number of bad rows by kind, reported ones included. It goes into a run's record."""
        return dict(self._counts)

    @property
    def refuses(self) -> bool:
        """Whether `raise_or_warn` will raise."""
        return self._on_bad == "refuse" and bool(self._unreported)

    def add(self, kind: Kind, origin: str, detail: str = "") -> None:
        """Add a fault of the row at `origin`, such as "data.jsonl line 3"."""
        self._counts[kind] += 1
        occurrences = self._unreported.setdefault(kind, _Occurrences())
        occurrences.count += 1
        if len(occurrences.shown) < NUM_SHOWN:
            occurrences.shown.append((origin, detail if len(detail) <= MAX_DETAIL else detail[: MAX_DETAIL - 1] + "…"))

    def hint(self, text: str) -> None:
        """Add a hint about the expected form of rows to the error message. A hint that was added before is ignored."""
        if text not in self._hints:
            self._hints.append(text)

    def raise_or_warn(self) -> None:
        """Report the faults since the last report: raise `DataError` or, if bad rows are skipped, log a warning for each kind."""
        if self.refuses:
            raise DataError(self._refusal())
        for kind, occurrences in self._unreported.items():
            origins = ", ".join(origin for origin, _ in occurrences.shown) + (
                f" and {occurrences.num_more} more" if occurrences.num_more else ""
            )
            first = f"; the first: {detail}" if (detail := occurrences.shown[0][1]) else ""
            logger.warning("rows left out, %s: %d (%s%s)", kind, occurrences.count, origins, first)
        self._unreported = {}

    def _refusal(self) -> str:
        lines = [f"bad rows in the data: {sum(occurrences.count for occurrences in self._unreported.values())}"]
        for kind, occurrences in self._unreported.items():
            lines.append(f"  {kind}: {occurrences.count}")
            lines += [f"    {origin}" + (f": {detail}" if detail else "") for origin, detail in occurrences.shown]
            lines += [f"    and {occurrences.num_more} more"] if occurrences.num_more else []
        lines += [*dict.fromkeys(HINTS[kind] for kind in self._unreported if kind in HINTS), *self._hints]
        lines += ["--on-bad skip leaves such rows out, and counts them."] if self._can_skip else []
        return "\n".join(lines)


@contextmanager
def collecting(faults: Faults | None) -> Iterator[Faults]:
    """Context manager of a collector: `faults`, which the caller reports, or if None a new one that raises at the end."""
    collector = Faults(can_skip=False) if faults is None else faults
    yield collector
    if faults is None:
        collector.raise_or_warn()
