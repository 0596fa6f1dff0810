"""What is wrong with rows: counted by kind, with the places where it was found. Knows nothing of files or tokens.

One `Faults` goes with a run through all its sources, so that everything is said at once.
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
"""How many rows of a kind are named; the others are counted."""
MAX_DETAIL = 200
"""Characters of a row's fault that are shown: a template's own words have no bound."""


class DataError(LoriError):
    """The data cannot be used: says which file and line, what was found and what was expected."""


@dataclass(slots=True)
class _Places:
    count: int = 0
    shown: list[tuple[str, str]] = field(default_factory=list)
    """Where, and what, of the first ones."""

    @property
    def num_more(self) -> int:
        return self.count - len(self.shown)


class Faults:
    """Collects what is wrong with rows; `settle` then refuses them all, or says that they were left out."""

    def __init__(self, on_bad: OnBad = "refuse", can_skip: bool = True) -> None:
        """`can_skip` says that the program has `--on-bad`, which the message of a refusal then names."""
        self._on_bad, self._can_skip = on_bad, can_skip
        self._counts: Counter[str] = Counter()
        self._unsaid: dict[Kind, _Places] = {}
        self._hints: list[str] = []

    @property
    def counts(self) -> dict[str, int]:
        """How many rows of each kind were found since the beginning: a run's record holds it."""
        return dict(self._counts)

    @property
    def refuses(self) -> bool:
        """Whether `settle` will raise."""
        return self._on_bad == "refuse" and bool(self._unsaid)

    def add(self, kind: Kind, origin: str, detail: str = "") -> None:
        """Note a fault of the row at `origin`, such as "data.jsonl line 3"."""
        self._counts[kind] += 1
        places = self._unsaid.setdefault(kind, _Places())
        places.count += 1
        if len(places.shown) < NUM_SHOWN:
            places.shown.append((origin, detail if len(detail) <= MAX_DETAIL else detail[: MAX_DETAIL - 1] + "…"))

    def hint(self, text: str) -> None:
        """Note what is said of the form of rows, once, where they are refused."""
        if text not in self._hints:
            self._hints.append(text)

    def settle(self) -> None:
        """Says what was found since the last time: raises `DataError` or, where rows are skipped, warns of each kind."""
        if self.refuses:
            raise DataError(self._refusal())
        for kind, places in self._unsaid.items():
            where = ", ".join(origin for origin, _ in places.shown) + (f" and {places.num_more} more" if places.num_more else "")
            first = f"; the first: {detail}" if (detail := places.shown[0][1]) else ""
            logger.warning("rows left out, %s: %d (%s%s)", kind, places.count, where, first)
        self._unsaid = {}

    def _refusal(self) -> str:
        lines = [f"bad rows in the data: {sum(places.count for places in self._unsaid.values())}"]
        for kind, places in self._unsaid.items():
            lines.append(f"  {kind}: {places.count}")
            lines += [f"    {origin}" + (f": {detail}" if detail else "") for origin, detail in places.shown]
            lines += [f"    and {places.num_more} more"] if places.num_more else []
        lines += [*dict.fromkeys(HINTS[kind] for kind in self._unsaid if kind in HINTS), *self._hints]
        lines += ["--on-bad skip leaves such rows out, and counts them."] if self._can_skip else []
        return "\n".join(lines)


@contextmanager
def settled(faults: Faults | None) -> Iterator[Faults]:
    """Give the caller's own `faults`, who settles them; or new ones that refuse, settled at the end."""
    own = Faults(can_skip=False) if faults is None else faults
    yield own
    if faults is None:
        own.settle()
