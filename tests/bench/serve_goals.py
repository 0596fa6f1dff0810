"""Performance goals of this server."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.bench.serve_cases import NUM_DISTINCT
from tests.bench.serve_figures import Spread, gaps_ms, number, percentile, ratios
from tests.bench.serve_load import Load
from tests.bench.serve_results import Results
from tests.bench.serve_run import OPEN

MOST = {
    "cold adapter, alone: more to the first token, ms": 10.0,
    "cold adapter, beside 8: more to the first token, ms": 10.0,
    "cold adapter, beside 8: their largest gap grows by, ms": 5.0,
    "long prompt, beside 8: their largest gap / usual": 2.0,
    "long prompt, beside 31: their largest gap / usual": 2.0,
}
"""Maximum of each probe's figure."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure with its limit: a minimum if `is_least`, otherwise a maximum."""

    what: str
    value: Spread
    limit: float
    is_least: bool = True

    @property
    def is_met(self) -> bool:
        """Whether the median meets the limit."""
        return self.value.median >= self.limit if self.is_least else self.value.median <= self.limit

    def __str__(self) -> str:
        result, bound = "met" if self.is_met else "missed", "at least" if self.is_least else "at most"
        return f"{result:8}{self.what}: {self.value}, {bound} {number(self.limit)}"


def goals(results: Results, num_weight_bytes: int) -> Iterator[Goal]:
    """Yield the goals whose cases were measured."""
    loads_of, many = results.loads_of, str(NUM_DISTINCT)
    wanted = [
        ("base / vLLM's base", "off", "vllm-off", 1.0),
        ("LoRI on, unused / off", "unused", "off", 0.99),
        (f"{many} adapters / none", many, "off", 0.92),
        (f"{many} merges of 2 / none", "merge2", "off", 0.87),
        # Two processes of the same build differ in speed; these ratios compare requests to the same process.
        (f"{many} adapters / unused", many, "unused", 0.92),
        (f"{many} merges of 2 / unused", "merge2", "unused", 0.87),
        (f"{many} merges of 2, weights by layer / merges of 2", "blocks2", "merge2", 0.95),
        (f"{many} merges of 4, weights by layer / merges of 4", "blocks4", "merge4", 0.93),
        ("zipf / one adapter", "zipf", "1", 0.95),
        ("base / transformers' float32", "off", "transformers-off", 1.0),
        (f"{many} adapters / vLLM's {many}", many, f"vllm-{many}", 6.0),
        (f"{many} adapters / PEFT's {many}", many, f"peft-{many}", 6.0),
    ]
    measured = [(title, ratios(loads_of(slug), loads_of(reference)), least) for title, slug, reference, least in wanted]
    yield from (Goal(title, ratio, least) for title, ratio, least in measured if ratio)
    if ratio := ratios(loads_of("off", 1), loads_of("transformers-off", 1)):
        yield Goal("one user / transformers' float32", ratio, 1.6)
    yield from _alone(loads_of("off", 1), results.bandwidths, num_weight_bytes)
    yield from (
        Goal(title, Spread.of(results.figures[title]), most, False) for title, most in MOST.items() if title in results.figures
    )
    if loads := results.loads.get(OPEN):
        tails = (gaps_ms([load]) for load in loads)
        spread = Spread.of((percentile(gaps, 99) or 0.0) / (percentile(gaps, 50) or 1.0) for gaps in tails)
        yield Goal("open loop: p99 / p50 between tokens", spread, 3.0, False)


def _alone(loads: Sequence[Load], bandwidths: Sequence[float], num_weight_bytes: int) -> Iterator[Goal]:
    """Yield goals of one user's tokens/s relative to the bandwidth bound: with prompts included, and while decoding."""
    if not loads:
        return
    bounds = [bandwidth / num_weight_bytes for bandwidth in bandwidths]
    pairs = list(zip(loads, bounds, strict=False))
    yield Goal("one user / bandwidth bound", Spread.of(load.tokens_per_s / bound for load, bound in pairs), 0.8)
    gaps = [sum(gaps_of_load) / len(gaps_of_load) / 1e3 if (gaps_of_load := gaps_ms([load])) else 1.0 for load in loads]
    decoding = Spread.of(1 / (gap * bound) for gap, bound in zip(gaps, bounds, strict=False))
    yield Goal("one user, between tokens / bandwidth bound", decoding, 0.8)
