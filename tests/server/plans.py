"""Requests of plain values, a gate that a test opens by hand, and steps without a model, for tests of the scheduler."""

from collections.abc import Iterable

from server.engine.request import AdapterTerm, Chunk, Request, SamplingParams, Sequence
from server.engine.scheduling.kv_cache import KvCache
from server.engine.scheduling.scheduler import Residency, Scheduler
from server.engine.scheduling.step_budget import Curve, StepCost, StepLimits


def request(
    num_prompt: int = 4,
    max_tokens: int = 4,
    *,
    text: int = 0,
    adapters: Iterable[str] = (),
    weight: float = 1.0,
    num_choices: int = 1,
    priority: int = 0,
    tenant: str = "",
    is_scored: bool = False,
) -> Request:
    """Return a request. Prompts of the same `text` have a common prefix."""
    ids = tuple(range(1000 * text, 1000 * text + num_prompt))
    return Request(
        id="request",
        prompt_text="",
        prompt_ids=ids,
        prompt_offsets=(0,) * num_prompt,
        max_tokens=max_tokens,
        terms=tuple(AdapterTerm(digest, digest, weight) for digest in adapters),
        sampling=SamplingParams(num_choices=num_choices, echo=is_scored, num_logprobs=0 if is_scored else None),
        priority=priority,
        tenant=tenant,
    )


def digests(sequence: Sequence) -> set[str]:
    return {digest for digest, _ in sequence.request.residents}


class FakeGate:
    """A gate of `num_slots` adapters whose loads take `delays` ticks. It asserts that the scheduler keeps its contract."""

    def __init__(self, num_slots: int = 1000, delays: dict[str, int] | None = None) -> None:
        self.num_slots, self.delays = num_slots, delays or {}
        self.held: dict[Sequence, Residency] = {}
        """The last answer to each sequence that holds adapters: "ready" or "loading"."""
        self.resident: dict[str, int] = {}
        """Ticks until each adapter is loaded. The least recently loaded adapter is first."""
        self.asked: list[Sequence] = []

    def acquire(self, sequence: Sequence) -> Residency:
        assert self.held.get(sequence) != "ready", "only waiting sequences acquire adapters"
        self.asked.append(sequence)
        wanted = digests(sequence)
        in_use = {digest for other in self.held if other is not sequence for digest in digests(other)}
        if len(wanted | in_use) > self.num_slots:
            self.held.pop(sequence, None)
            assert self.held, "the gate is full only if a sequence holds adapters"
            return "full"
        for digest in wanted - self.resident.keys():
            self.resident[digest] = self.delays.get(digest, 0)
        for digest in [d for d in self.resident if d not in wanted | in_use][: max(0, len(self.resident) - self.num_slots)]:
            del self.resident[digest]
        self.held[sequence] = "loading" if any(self.resident[digest] for digest in wanted) else "ready"
        return self.held[sequence]

    def is_load_deferred(self, _: Sequence) -> bool:
        return False

    def release(self, sequence: Sequence) -> None:
        del self.held[sequence]

    def tick(self) -> list[str]:
        """Advance all loads by a tick; return the adapters that became ready."""
        loading = [digest for digest, ticks in self.resident.items() if ticks]
        for digest in loading:
            self.resident[digest] -= 1
        return [digest for digest in loading if not self.resident[digest]]


MEASURED = StepCost(
    prompt=Curve((1, 16, 64), (9.0, 12.0, 36.0)), decoding=Curve((1, 16, 64), (9.0, 15.0, 45.0)), per_key=0.001, per_pair=0.0002
)
"""Milliseconds of a model on a CPU: the first 16 tokens cost little, every further one about half a millisecond."""


def step_cost(free_tokens: int = 0, per_key: float = 0.0, per_pair: float = 0.0) -> StepCost:
    """Return the cost of steps that take one unit per token, plus a constant of `free_tokens` units."""
    line = Curve((1, 2), (1.0 + free_tokens, 2.0 + free_tokens))
    return StepCost(prompt=line, decoding=line, per_key=per_key, per_pair=per_pair)


def step_limits(
    max_sequences: int,
    max_tokens: int,
    max_stall: float = float("inf"),
    short_step_s: float = 0.0,
    cost: StepCost | None = None,
) -> StepLimits:
    """Return the limits of steps, which take one unit per token unless `cost` is given."""
    return StepLimits(
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        max_stall=max_stall,
        short_step_s=short_step_s,
        cost=cost or step_cost(),
    )


def scheduler(
    num_blocks: int = 64,
    *,
    block_size: int = 4,
    max_sequences: int = 4,
    max_tokens: int = 8,
    max_stall: float = float("inf"),
    short_step_s: float = 0.0,
    cost: StepCost | None = None,
    gate: FakeGate | None = None,
    max_priority_wait_s: float = float("inf"),
) -> Scheduler:
    limits = step_limits(max_sequences, max_tokens, max_stall, short_step_s, cost)
    return Scheduler(KvCache(num_blocks, block_size, "base"), gate or FakeGate(), limits, max_priority_wait_s)


def added(to: Scheduler, new: Request | None = None, deadline: float | None = None) -> Sequence:
    """Add a request of one choice to a scheduler, and return its sequence."""
    (sequence,) = added_choices(to, new or request(), deadline)
    return sequence


def added_choices(to: Scheduler, new: Request, deadline: float | None = None) -> list[Sequence]:
    sequences = [Sequence(new, choice, deadline=deadline) for choice in range(new.sampling.num_choices)]
    for sequence in sequences:
        to.add(sequence)
    return sequences


def is_done(sequence: Sequence) -> bool:
    request = sequence.request
    return len(sequence.output_ids) == request.max_tokens and sequence.num_computed >= len(request.prompt_ids)


def run_step(planner: Scheduler) -> list[Chunk]:
    """Plan a step and commit it, with token 7 as every sampled token. Finish the sequences that have all their tokens."""
    chunks = planner.plan()
    planner.check_integrity()
    for chunk in chunks:
        planner.commit(chunk, 7 if chunk.is_last else None)
        if is_done(chunk.sequence):
            planner.finish(chunk.sequence)
    planner.check_integrity()
    return chunks


def run(planner: Scheduler, max_steps: int = 1000) -> list[list[Chunk]]:
    """Run steps until no work is left; check that all blocks are free then."""
    steps = []
    while planner.has_work:
        assert len(steps) < max_steps
        steps.append(run_step(planner))
    assert planner.kv_cache.num_available == planner.kv_cache.num_blocks
    return steps


def spans(chunks: Iterable[Chunk]) -> list[tuple[Sequence, int, int]]:
    return [(c.sequence, c.start, c.stop) for c in chunks]


def num_tokens(chunks: Iterable[Chunk]) -> int:
    return sum(c.stop - c.start for c in chunks)
