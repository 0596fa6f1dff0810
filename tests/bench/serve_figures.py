"""What a benchmark of a server says in numbers: rows of a table, and what comes of several runs."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.bench.serve_load import Load

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure of several runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Returns the median and the range of at least one value."""
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)}–{number(self.high)})"


@dataclass(frozen=True, slots=True)
class Row:
    """One case of one engine at one concurrency (0: an open loop). Times in ms, over all runs; None where nothing streams.

    `ratio` is that of tokens/s to the same engine's without any adapter, in the same turn.
    """

    engine: str
    case: str
    adapters: int
    terms: int
    concurrency: int
    tokens_per_s: float
    tokens_per_s_low: float
    tokens_per_s_high: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    prompt_tokens: float
    ttft_p50: float | None
    ttft_p95: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p95: float | None
    itl_p99: float | None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Returns the smallest of `values` that `percent` of them do not exceed (nearest rank); None where there are none."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None


def first_ms(loads: Iterable[Load]) -> list[float]:
    """Returns the times to the first token in ms, of replies that streamed."""
    return [1e3 * reply.first_s for load in loads for reply in load.replies if reply.times]


def gaps_ms(loads: Iterable[Load]) -> list[float]:
    """Returns the times between tokens in ms."""
    return [1e3 * gap for load in loads for reply in load.replies for gap in reply.gaps_s]


def ratios(loads: Sequence[Load], others: Sequence[Load]) -> Spread | None:
    """Returns tokens/s of `loads` to those of `others`, turn by turn; None where either was not measured."""
    pairs = list(zip(loads, others, strict=False))
    return Spread.of(load.tokens_per_s / other.tokens_per_s for load, other in pairs) if pairs else None


def number(value: float) -> str:
    """Returns a number in as few digits as it needs to be compared."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
