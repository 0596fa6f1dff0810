"""Cases of the server benchmark, and the targets that they need."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tests.bench.serve_adapters import adapter_name, merge_name
from tests.bench.serve_asks import Choice, distinct, no_adapter, zipf

OWN, VLLM, LLAMA, PEFT, TRANSFORMERS = "lori-server", "vLLM", "llama.cpp", "PEFT", "transformers"
CONCURRENCY = [1, 8, 32, 64]
NUM_DISTINCT = 32
MERGE_SIZES = (2, 4)
"""Numbers of adapters in a merge."""
PROBES = ("open", "cold", "long")
"""Measurements other than closed loops, see `tests.bench.serve_probes`."""


@dataclass(frozen=True, slots=True)
class Case:
    """A closed loop of requests to a target. `target` is a server of the engine: "on" with adapters, or "off" without.

    `slug` is the case's name on the command line. For other engines it is the engine's name, a hyphen, and the case.
    """

    slug: str
    title: str
    engine: str
    target: str
    adapters: int
    terms: int
    choose: Callable[[str], Choice]
    """Function from the seed of a run to its choice of adapters."""

    @property
    def group(self) -> str:
        """The name that selects the case on the command line. All cases of another engine have the same group."""
        return self.slug.partition("-")[0]

    @property
    def base(self) -> str:
        """Slug of the same engine's case without adapters."""
        return "off" if self.engine == OWN else f"{self.group}-off"


@dataclass(frozen=True, slots=True)
class Trial:
    """A case at one concurrency (0 for an open loop), which is measured once in every round."""

    case: Case
    concurrency: int

    @property
    def num_requests(self) -> int:
        """Number of requests: at least one for each user, and more if there are few users."""
        return max(8, 2 * self.concurrency) if self.concurrency <= 8 else self.concurrency


def names(count: int) -> list[str]:
    """Return the names of the first `count` adapters."""
    return [adapter_name(i) for i in range(count)]


def own_cases(num_registered: int) -> list[Case]:
    """Return the cases of this project's server."""
    cases = [
        _case("off", "LoRI off", OWN, "off", 0, 0),
        _case("unused", "LoRI on, unused", OWN, "on", 0, 0),
        *(_case(str(n), _count(n), OWN, "on", n, 1) for n in (1, 8, NUM_DISTINCT)),
        *(_case(f"merge{k}", f"{NUM_DISTINCT} merges of {k}", OWN, "on", NUM_DISTINCT, k) for k in MERGE_SIZES),
        *(_case_of_blocks(k) for k in MERGE_SIZES),
    ]
    title = f"zipf of {num_registered:,}"
    many = names(num_registered)
    return [*cases, Case("zipf", title, OWN, "on", num_registered, 1, lambda seed: zipf(many, seed))]


def peer_cases() -> list[Case]:
    """Return the cases of the other engines."""
    return [
        _case("vllm-off", "LoRA off", VLLM, "off", 0, 0),
        _case("vllm-unused", "LoRA on, unused", VLLM, "on", 0, 0),
        _case(f"vllm-{NUM_DISTINCT}", _count(NUM_DISTINCT), VLLM, "on", NUM_DISTINCT, 1),
        _case("llama.cpp-off", "base", LLAMA, "off", 0, 0),
        _case("peft-off", "transformers' generate, bfloat16", PEFT, "off", 0, 0),
        _case("transformers-off", "generate, float32", TRANSFORMERS, "off", 0, 0),
        *(_case(f"peft-{n}", _count(n), PEFT, "on", n, 1) for n in (1, 8, NUM_DISTINCT)),
    ]


def trials(cases: Iterable[Case], concurrency: Sequence[int]) -> list[Trial]:
    """Return the trials of a round. Slow cases (PEFT, and vLLM with adapters) have 32 users only."""
    chosen = []
    for case in cases:
        is_slow = case.engine == PEFT or (case.engine == VLLM and case.target == "on")
        chosen += [Trial(case, users) for users in concurrency if users == NUM_DISTINCT or not is_slow]
    return chosen


def _case(slug: str, title: str, engine: str, target: str, adapters: int, terms: int) -> Case:
    choice = distinct(names(adapters), terms) if adapters else no_adapter
    return Case(slug, title, engine, target, adapters, terms, lambda _: choice)


def _case_of_blocks(num_terms: int) -> Case:
    choice = distinct([merge_name(num_terms, i) for i in range(NUM_DISTINCT)])
    title = f"{NUM_DISTINCT} merges of {num_terms}, weights by layer"
    return Case(f"blocks{num_terms}", title, OWN, "on", NUM_DISTINCT, num_terms, lambda _: choice)


def _count(adapters: int) -> str:
    return f"{adapters} adapter{'s' * (adapters > 1)}"
