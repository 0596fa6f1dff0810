"""Results of the server benchmark, and its table."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.bench.serve_cases import NUM_DISTINCT, Trial
from tests.bench.serve_figures import PERCENTILES, Row, Spread, first_ms, gaps_ms, number, percentile, ratios
from tests.bench.serve_load import Load


@dataclass(frozen=True, slots=True)
class Results:
    """The loads of each trial and the figures of each probe, one for each round; and the cores' memory bandwidth in bytes/s.

    `disturbances`: for each load, the fraction of its time for which the cores were busy with other processes than the target.
    """

    loads: dict[Trial, list[Load]] = field(default_factory=lambda: defaultdict(list))
    figures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    bandwidths: list[float] = field(default_factory=list)
    disturbances: list[float] = field(default_factory=list)

    def loads_of(self, slug: str, concurrency: int = NUM_DISTINCT) -> Sequence[Load]:
        """Return the loads of a case; empty if it was not measured."""
        matches = (loads for trial, loads in self.loads.items() if (trial.case.slug, trial.concurrency) == (slug, concurrency))
        return next(matches, [])

    def rows(self) -> list[Row]:
        """Return a row for each case and concurrency."""
        return [self._row(trial, loads) for trial, loads in self.loads.items()]

    def _row(self, trial: Trial, loads: Sequence[Load]) -> Row:
        case, speed = trial.case, Spread.of(load.tokens_per_s for load in loads)
        ratio = ratios(loads, self.loads_of(case.base, trial.concurrency))
        first, gaps = first_ms(loads), gaps_ms(loads)
        prompts = [reply.num_prompt for load in loads for reply in load.replies]
        return Row(
            case.engine, case.title, case.adapters, case.terms, trial.concurrency, speed.median, speed.low, speed.high,
            ratio and ratio.median, ratio and ratio.low, ratio and ratio.high, statistics.mean(prompts),
            *(percentile(first, percent) for percent in PERCENTILES), *(percentile(gaps, percent) for percent in PERCENTILES),
        )  # fmt: skip


COLUMNS = [
    "engine",
    "case",
    "users",
    "tokens/s",
    "of no adapter",
    "first token, ms: p50",
    "p95",
    "p99",
    "gap, ms: p50",
    "p95",
    "p99",
]


def cells(row: Row) -> list[str]:
    """Return a row as text."""
    users = str(row.concurrency) if row.concurrency else "Poisson"
    ratio = "–" if row.ratio is None else f"{row.ratio:.3f} ({row.ratio_low:.3f}–{row.ratio_high:.3f})"
    times = (row.ttft_p50, row.ttft_p95, row.ttft_p99, row.itl_p50, row.itl_p95, row.itl_p99)
    speed = str(Spread(row.tokens_per_s, row.tokens_per_s_low, row.tokens_per_s_high))
    return [row.engine, row.case, users, speed, ratio, *("–" if time is None else number(time) for time in times)]
