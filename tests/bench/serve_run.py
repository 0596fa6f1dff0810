"""Run of the server benchmark. Every round measures all cases, so that a drift of the machine's speed affects all alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.machine import bandwidth_of
from tests.bench.serve_asks import make_asks, no_adapter
from tests.bench.serve_cases import NUM_DISTINCT, OWN, Case, Trial, names
from tests.bench.serve_probes import Sizes, probe_cold, probe_long, probe_open
from tests.bench.serve_processes import busy_s
from tests.bench.serve_results import Results
from tests.bench.serve_stage import Stage

OPEN_SHARE = 0.8
"""Rate of requests in the open loop, relative to the closed loop's rate."""
NUM_OTHERS = (8, 31)
"""Numbers of requests that decode when a long prompt arrives."""
OPEN = Trial(Case("open", f"open loop, {NUM_DISTINCT} adapters", OWN, "on", NUM_DISTINCT, 1, lambda _: no_adapter), 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """The trials and probes of every round."""

    trials: Sequence[Trial]
    probes: Sequence[str]
    sizes: Sizes
    num_warm: int = 0
    """Number of requests before a zipf case is measured, which fill the server's memory with adapters by popularity."""

    @property
    def size(self) -> int:
        """Number of parts of a round."""
        return len(self.trials) + len(self.probes)

    def run(self, stage: Stage, repeats: int, tick: Callable[[str], None]) -> Results:
        """Measure everything. Calls `tick` with a description after each part."""
        results = Results()
        self._warm(stage)
        for repeat in range(repeats):
            results.bandwidths.append(bandwidth_of(stage.setting.cores))
            for trial in self.trials:
                self._load(stage, trial, results, f"{repeat} {trial.case.slug} {trial.concurrency}")
                tick(f"{trial.case.engine}, {trial.case.title}, {trial.concurrency} users")
            for name in self.probes:
                self._probe(stage, name, results, f"{repeat} {name}")
                tick(name)
        return results

    def _warm(self, stage: Stage) -> None:
        for trial in self.trials:
            if trial.case.slug == "zipf":
                asks = make_asks("warm zipf", self.num_warm, 10, 1, trial.case.choose("warm"))
                with stage.on(trial.case.engine, trial.case.target) as target:
                    target.measure(asks, NUM_DISTINCT)
                return

    def _load(self, stage: Stage, trial: Trial, results: Results, seed: str) -> None:
        words, tokens = self.sizes.prompt_words, self.sizes.num_tokens
        asks = make_asks(seed, trial.num_requests, words, tokens, trial.case.choose(seed))
        with stage.on(trial.case.engine, trial.case.target) as target:
            before = busy_s(stage.setting.cores) - target.program.cpu_s()
            load = target.measure(asks, trial.concurrency)
            others = busy_s(stage.setting.cores) - target.program.cpu_s() - before
        results.loads[trial].append(load)
        results.disturbances.append(others / load.seconds / len(stage.setting.cores))

    def _probe(self, stage: Stage, name: str, results: Results, seed: str) -> None:
        popular = names(NUM_DISTINCT)
        with stage.own() as server:
            if name == "open":
                closed = results.loads_of(str(NUM_DISTINCT))[-1]
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
