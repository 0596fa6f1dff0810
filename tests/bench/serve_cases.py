"""What the benchmark of the server measures: the cases, and the targets that they need."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tests.bench.serve_adapters import adapter_name
from tests.bench.serve_asks import Choice, distinct, no_adapter, zipf

OWN, VLLM, LLAMA, PEFT = "lori-server", "vLLM", "llama.cpp", "PEFT"
CONCURRENCY = [1, 8, 32, 64]
NUM_DISTINCT = 32
PROBES = ("open", "cold", "long")
"""What is no closed loop, see `tests.bench.serve_probes`."""


@dataclass(frozen=True, slots=True)
class Case:
    """A closed loop: who asks what of which target. `target` tells apart an engine's servers: "on" has adapters, "off" none.

    `slug` is what it is called on the command line; a peer's is followed by what the case is.
    """

    slug: str
    title: str
    engine: str
    target: str
    adapters: int
    terms: int
    choose: Callable[[str], Choice]
    """Returns the choice of a run, which has a seed."""

    @property
    def group(self) -> str:
        """What selects it on the command line: a peer's cases come together."""
        return self.slug.partition("-")[0]

    @property
    def base(self) -> str:
        """The slug of the same engine without any adapter."""
        return "off" if self.engine == OWN else f"{self.group}-off"


@dataclass(frozen=True, slots=True)
class Turn:
    """A case at one concurrency, 0 for an open loop: what is measured once in every repeat."""

    case: Case
    concurrency: int

    @property
    def num_requests(self) -> int:
        """Each user asks at least once, and few users more often."""
        return max(8, 2 * self.concurrency) if self.concurrency <= 8 else self.concurrency


def names(count: int) -> list[str]:
    """Returns the names of the first adapters."""
    return [adapter_name(i) for i in range(count)]


def own_cases(num_registered: int) -> list[Case]:
    """Returns the cases of this project's server."""
    cases = [
        _case("off", "LoRI off", OWN, "off", 0, 0),
        _case("unused", "LoRI on, unused", OWN, "on", 0, 0),
        *(_case(str(n), _count(n), OWN, "on", n, 1) for n in (1, 8, NUM_DISTINCT)),
        *(_case(f"merge{k}", f"{NUM_DISTINCT} merges of {k}", OWN, "on", NUM_DISTINCT, k) for k in (2, 4)),
    ]
    title = f"zipf of {num_registered:,}"
    many = names(num_registered)
    return [*cases, Case("zipf", title, OWN, "on", num_registered, 1, lambda seed: zipf(many, seed))]


def peer_cases() -> list[Case]:
    """Returns the cases of the others."""
    return [
        _case("vllm-off", "LoRA off", VLLM, "off", 0, 0),
        _case("vllm-unused", "LoRA on, unused", VLLM, "on", 0, 0),
        _case(f"vllm-{NUM_DISTINCT}", _count(NUM_DISTINCT), VLLM, "on", NUM_DISTINCT, 1),
        _case("llama.cpp-off", "base", LLAMA, "off", 0, 0),
        _case("peft-off", "transformers' generate", PEFT, "off", 0, 0),
        *(_case(f"peft-{n}", _count(n), PEFT, "on", n, 1) for n in (1, 8, NUM_DISTINCT)),
    ]


def turns(cases: Iterable[Case], concurrency: Sequence[int]) -> list[Turn]:
    """Returns what a repeat measures; the slow ones, which are peers' with adapters and `generate`, at 32 users alone."""
    chosen = []
    for case in cases:
        is_slow = case.engine == PEFT or (case.engine == VLLM and case.target == "on")
        chosen += [Turn(case, users) for users in concurrency if users == NUM_DISTINCT or not is_slow]
    return chosen


def _case(slug: str, title: str, engine: str, target: str, adapters: int, terms: int) -> Case:
    choice = distinct(names(adapters), terms) if adapters else no_adapter
    return Case(slug, title, engine, target, adapters, terms, lambda _: choice)


def _count(adapters: int) -> str:
    return f"{adapters} adapter{'s' * (adapters > 1)}"
