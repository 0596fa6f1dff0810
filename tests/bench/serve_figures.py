"""Figures of a server benchmark: rows of a table, percentiles, and spreads over several runs."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.bench.serve_load import Load

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of one figure over several runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the spread of at least one value."""
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)}–{number(self.high)})"


@dataclass(frozen=True, slots=True)
class Row:
    """One case of one engine at one concurrency (0: an open loop). Times in ms, over all runs; None without streaming.

    `ratio` is tokens/s relative to the same engine without adapters, in the same round.
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
    """Return the percentile of `values` by nearest rank; None if there are no values."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None


def first_ms(loads: Iterable[Load]) -> list[float]:
    """Return the times to the first token in ms, of replies that streamed."""
    return [1e3 * reply.first_s for load in loads for reply in load.replies if reply.times]


def gaps_ms(loads: Iterable[Load]) -> list[float]:
    """Return the times between tokens in ms."""
    return [1e3 * gap for load in loads for reply in load.replies for gap in reply.gaps_s]


def ratios(loads: Sequence[Load], others: Sequence[Load]) -> Spread | None:
    """Return the ratio of tokens/s of `loads` and `others`, round by round; None if either was not measured."""
    pairs = list(zip(loads, others, strict=False))
    return Spread.of(load.tokens_per_s / other.tokens_per_s for load, other in pairs) if pairs else None


def number(value: float) -> str:
    """Return a number as text with about three digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
