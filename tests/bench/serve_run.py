"""Run of the server benchmark. The cases take turns in every repeat, so that a drift of the machine's speed affects all alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.machine import bandwidth_of
from tests.bench.serve_asks import make_asks, no_adapter
from tests.bench.serve_cases import NUM_DISTINCT, OWN, Case, Turn, names
from tests.bench.serve_probes import Sizes, probe_cold, probe_long, probe_open
from tests.bench.serve_processes import busy_s
from tests.bench.serve_results import Results
from tests.bench.serve_stage import Stage

OPEN_SHARE = 0.8
"""Rate of requests in the open loop, relative to the closed loop's rate."""
NUM_OTHERS = (8, 31)
"""Numbers of requests that decode when a long prompt arrives."""
OPEN = Turn(Case("open", f"open loop, {NUM_DISTINCT} adapters", OWN, "on", NUM_DISTINCT, 1, lambda _: no_adapter), 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """The turns and probes of every repeat."""

    turns: Sequence[Turn]
    probes: Sequence[str]
    sizes: Sizes
    num_warm: int = 0
    """Number of requests before a zipf case is measured, which fill the server's memory with adapters by popularity."""

    @property
    def size(self) -> int:
        """Number of parts of a repeat."""
        return len(self.turns) + len(self.probes)

    def run(self, stage: Stage, repeats: int, tick: Callable[[str], None]) -> Results:
        """Measure everything. Calls `tick` with a description after each part."""
        results = Results()
        self._warm(stage)
        for repeat in range(repeats):
            results.bandwidths.append(bandwidth_of(stage.setting.cores))
            for turn in self.turns:
                self._load(stage, turn, results, f"{repeat} {turn.case.slug} {turn.concurrency}")
                tick(f"{turn.case.engine}, {turn.case.title}, {turn.concurrency} users")
            for name in self.probes:
                self._probe(stage, name, results, f"{repeat} {name}")
                tick(name)
        return results

    def _warm(self, stage: Stage) -> None:
        for turn in self.turns:
            if turn.case.slug == "zipf":
                asks = make_asks("warm zipf", self.num_warm, 10, 1, turn.case.choose("warm"))
                with stage.on(turn.case.engine, turn.case.target) as target:
                    target.measure(asks, NUM_DISTINCT)
                return

    def _load(self, stage: Stage, turn: Turn, results: Results, seed: str) -> None:
        words, tokens = self.sizes.prompt_words, self.sizes.num_tokens
        asks = make_asks(seed, turn.num_requests, words, tokens, turn.case.choose(seed))
        with stage.on(turn.case.engine, turn.case.target) as target:
            before = busy_s(stage.setting.cores) - target.program.cpu_s()
            load = target.measure(asks, turn.concurrency)
            others = busy_s(stage.setting.cores) - target.program.cpu_s() - before
        results.loads[turn].append(load)
        results.disturbances.append(others / load.seconds / len(stage.setting.cores))

    def _probe(self, stage: Stage, name: str, results: Results, seed: str) -> None:
        popular = names(NUM_DISTINCT)
        with stage.own() as server:
            if name == "open":
                closed = results.of(str(NUM_DISTINCT))[-1]
                load = probe_open(server, OPEN_SHARE * closed.tokens_per_s, popular, self.sizes, seed)
                results.loads[OPEN].append(load)
            elif name == "cold":
                _note(results, probe_cold(server, popular, stage.cold, self.sizes, seed))
            else:
                for num_others in NUM_OTHERS:
                    _note(results, probe_long(server, num_others, popular, self.sizes, f"{seed} {num_others}"))


def _note(results: Results, figures: dict[str, float]) -> None:
    for name, value in figures.items():
        results.figures[name].append(value)
