"""Random schedules: the scheduler keeps its promises, and no step reads keys of other tokens or other adapters."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.request import Chunk, Request, Sequence
from server.engine.scheduling.kv_cache import needs_prompt_logprobs
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.step_budget import MAX_SHORT_STEPS, MIN_CHUNK_TOKENS, StepCost
from tests.server.plans import FakeGate, added_choices, digests, is_done, request, scheduler, step_cost

ADAPTERS = ("a", "b", "c", "bad")
MAX_STEPS = 2000


@dataclass(frozen=True)
class Arrival:
    """A request, the step in which it arrives, and the number of steps until it is cancelled or past its deadline."""

    step: int
    request: Request
    cancelled_after: int | None
    expires_after: int | None


@dataclass(frozen=True)
class Schedule:
    """The arrivals, and the scarce resources of the scheduler."""

    num_blocks: int
    block_size: int
    max_sequences: int
    max_prompt_tokens: int
    max_stall: float
    short_step_s: float
    cost: StepCost
    num_slots: int
    max_priority_wait: float
    """In steps."""
    delays: dict[str, int]
    arrivals: list[Arrival]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    num_blocks, block_size = draw(st.integers(2, 14)), draw(st.integers(1, 4))
    num_slots = draw(st.integers(2, 4))
    capacity = num_blocks * block_size
    arrivals = []
    for _ in range(draw(st.integers(1, 14))):
        num_prompt = draw(st.integers(1, min(capacity, 30)))
        new_request = request(
            num_prompt,
            draw(st.integers(0, min(24, capacity - num_prompt))),
            text=draw(st.integers(0, 1)),
            adapters=draw(st.sampled_from([(), (), ("a",), ("b",), ("c",), ("a", "b"), ("bad",), ("a", "bad")])),
            weight=draw(st.sampled_from([1.0, 0.5])),
            num_choices=draw(st.sampled_from([1, 1, 1, 2, 3])),
            priority=draw(st.sampled_from([0, 0, 1])),
            tenant=draw(st.sampled_from("tu")),
            is_scored=draw(st.booleans()) and draw(st.booleans()),
        )
        later = st.one_of(st.none(), st.none(), st.integers(0, 30))
        arrivals.append(Arrival(draw(st.integers(0, 12)), new_request, draw(later), draw(later)))
    return Schedule(
        num_blocks,
        block_size,
        draw(st.integers(1, 6)),
        draw(st.integers(1, 20)),
        draw(st.sampled_from([1.0, 1.5, 2.0, float("inf")])),
        draw(st.sampled_from([0.0, 3.0, 6.0, 12.0])),
        step_cost(draw(st.integers(0, 8)), draw(st.sampled_from([0.0, 0.1])), draw(st.sampled_from([0.0, 0.1]))),
        num_slots,
        draw(st.sampled_from([0.0, 1.0, 4.0, 12.0, float("inf")])),
        {adapter: draw(st.integers(0, 4)) for adapter in ADAPTERS} | {"bad": draw(st.integers(1, 4))},
        sorted(arrivals, key=lambda a: a.step),
    )


class FakeMemory:
    """KV memory that records the tokens and adapters of each place, and checks all places that a chunk reads."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._places: dict[tuple[int, int], object] = {}

    def compute(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        assert chunk.start == sequence.num_computed < chunk.stop <= sequence.num_tokens
        for position in range(chunk.stop):
            place = (sequence.blocks[position // self._block_size], position % self._block_size)
            source = (sequence.request.residents, tuple(sequence.ids(0, position + 1)))
            if position < chunk.start:
                assert self._places[place] == source, "keys of other tokens or adapters"
            self._places[place] = source


@dataclass
class Run:
    """The run of a schedule."""

    schedule: Schedule
    it: Scheduler
    gate: FakeGate
    memory: FakeMemory
    step: int = 0
    arrived: list[Sequence] = field(default_factory=list)
    joined: dict[Sequence, None] = field(default_factory=dict)
    scored: dict[Sequence, int] = field(default_factory=dict)
    ended: Counter[Sequence] = field(default_factory=Counter)
    cancelled_at: dict[int, list[Sequence]] = field(default_factory=lambda: defaultdict(list))

    def arrive(self) -> None:
        for arrival in self.schedule.arrivals:
            if arrival.step == self.step:
                deadline = None if arrival.expires_after is None else float(self.step + arrival.expires_after)
                sequences = added_choices(self.it, arrival.request, deadline)
                self.arrived += sequences
                if arrival.cancelled_after is not None:
                    self.cancelled_at[self.step + arrival.cancelled_after] += sequences

    def leave(self) -> None:
        loaded = self.gate.tick()
        if loaded:
            self.it.wake()
        if "bad" in loaded:
            failed = [s for s in (*self.it.waiting, *self.it.running) if "bad" in digests(s)]
            for sequence in failed:
                self.it.finish(sequence)
            self.ended.update(failed)
            self.gate.resident.pop("bad", None)
        for sequence in self.cancelled_at[self.step]:
            self.it.abort(sequence)
        aborted, expired = self.it.drop_aborted(), self.it.drop_expired(self.step)
        assert not any(s in self.cancelled_at[self.step] for s in (*self.it.waiting, *self.it.running))
        assert not any(s.deadline is not None and s.deadline <= self.step for s in (*self.it.waiting, *self.it.running))
        self.ended.update(aborted + expired)
        self.it.raise_overdue(self.step)
        self.it.check_integrity()

    def plan(self) -> list[Chunk]:
        ran = dict.fromkeys(self.it.running)
        could_step, num_preemptions = self.it.can_step, self.it.num_preemptions
        before = {s: s.num_preemptions for s in (*self.it.running, *self.it.waiting)}
        chunks = self.it.plan()
        self.it.check_integrity()
        self.joined |= dict.fromkeys(self.it.running)
        assert {s for s, answer in self.gate.held.items() if answer == "ready"} == self.it.running.keys()
        assert bool(chunks) == bool(self.it.running), "running sequences make progress"
        assert could_step or not chunks, "a scheduler that cannot step has no chunks"
        assert chunks or not self.it.waiting or "loading" in self.gate.held.values(), "only a load may keep all sequences waiting"
        preempted = {s for s, number in before.items() if s.num_preemptions > number}
        assert self.it.num_preemptions - num_preemptions == sum(s.num_preemptions - before[s] for s in preempted)
        assert ran.keys() - self.it.running.keys() <= preempted, "only a preempted sequence leaves before its end"
        self.check_sizes(chunks)
        return chunks

    def check_sizes(self, chunks: list[Chunk]) -> None:
        limits = self.it.limits
        sizes = [c.stop - c.start for c in chunks]
        assert sum(sizes) <= limits.max_tokens
        assert sizes == sorted(sizes, key=lambda size: size > 1), "chunks of one token come first"
        decoding = {s for s in self.it.running if s.num_tokens - s.num_computed == 1}
        assert decoding <= {c.sequence for c in chunks}, "every decoding sequence has a chunk in every step"
        assert len({c.sequence for c in chunks}) == len(chunks)
        if decoding:
            prompts = [c for c in chunks if c.sequence not in decoding]
            starts = [s for s in self.it.running if s not in decoding]
            num_short = sum(
                limits.cost.chunk_seconds(0, s.num_prefix_tokens, s.num_tokens - s.num_prefix_tokens)
                <= MAX_SHORT_STEPS * limits.short_step_s
                for s in starts
                if s.priority == min(s.priority for s in starts)
            )
            usual = limits.cost.decode_seconds([s.num_computed for s in decoding])
            seconds, num_tokens = usual, len(decoding)
            most = longest = limits.max_stall * usual
            long_seconds, long_sizes = usual, list[int]()
            for chunk in prompts:
                added = limits.cost.chunk_seconds(num_tokens, chunk.start, chunk.stop - chunk.start)
                seconds += added
                num_tokens += chunk.stop - chunk.start
                prefix = chunk.sequence.num_prefix_tokens
                if (
                    limits.cost.chunk_seconds(0, prefix, chunk.sequence.num_tokens - prefix)
                    <= MAX_SHORT_STEPS * limits.short_step_s
                ):
                    longest = max(most, limits.short_step_s * min(1 + num_short / len(decoding), 4))
                else:
                    long_seconds += added
                    long_sizes.append(chunk.stop - chunk.start)
            # The first prompt gets a minimal chunk even where there is no room.
            is_least = len(prompts) <= 1 and num_tokens - len(decoding) <= MIN_CHUNK_TOKENS + 1
            is_least_of_long = len(long_sizes) == 1 and long_sizes[0] <= MIN_CHUNK_TOKENS + 1
            assert is_least or seconds <= longest * (1 + 1e-9)
            assert is_least_of_long or long_seconds <= most * (1 + 1e-9)

    def commit(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            if needs_prompt_logprobs(sequence) and chunk.start:
                assert self.scored[sequence] == chunk.start, "no row of a prompt to be scored is left out"
            self.scored[sequence] = chunk.stop
            self.memory.compute(chunk)
            self.it.commit(chunk, token_of(sequence) if chunk.is_last else None)
            if is_done(sequence):
                self.it.finish(sequence)
                self.ended[sequence] += 1
        self.it.check_integrity()

    def check_order(self) -> None:
        """Check first come, first served among the sequences of a flow that never waited for another choice."""
        flows = defaultdict(list)
        for sequence in self.arrived:
            if sequence in self.joined and not sequence.choice:
                own_request = sequence.request
                flows[own_request.priority, own_request.tenant, tuple(sorted(digests(sequence)))].append(sequence)
        for sequences in flows.values():
            assert [s for s in self.joined if s in sequences] == sequences


def token_of(sequence: Sequence) -> int:
    """Return the next token of the fake model. It depends neither on the batch nor on how often it is computed."""
    return 100 + (len(sequence.output_ids) * 7 + sequence.choice) % 13


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(schedules())
def test_any_schedule_keeps_its_promises(schedule: Schedule) -> None:
    """With cancels, deadlines, choices, priorities, tenants, scarce memory, and adapters that are slow, bad or too many."""
    gate = FakeGate(schedule.num_slots, schedule.delays)
    it = scheduler(
        schedule.num_blocks,
        block_size=schedule.block_size,
        max_sequences=schedule.max_sequences,
        max_tokens=schedule.max_sequences + schedule.max_prompt_tokens,
        max_stall=schedule.max_stall,
        short_step_s=schedule.short_step_s,
        cost=schedule.cost,
        gate=gate,
        max_priority_wait_s=schedule.max_priority_wait,
    )
    run = Run(schedule, it, gate, FakeMemory(schedule.block_size))
    while run.step <= schedule.arrivals[-1].step or it.has_work:
        assert run.step < MAX_STEPS, "a sequence waits for ever"
        run.arrive()
        run.leave()
        run.commit(run.plan())
        run.step += 1
    run.check_order()
    assert run.ended == Counter(run.arrived), "every sequence ends exactly once"
    assert it.kv_cache.num_available == schedule.num_blocks
    assert not gate.held
    assert not it.has_work
    for sequence in run.arrived:
        if is_done(sequence):
            fresh = Sequence(sequence.request, sequence.choice)
            while len(fresh.output_ids) < sequence.request.max_tokens:
                fresh.output_ids.append(token_of(fresh))
            assert sequence.output_ids == fresh.output_ids
