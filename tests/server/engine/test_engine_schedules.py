"""Random schedules of an engine with a fake model and fake files: every request ends, and nothing is left behind."""

from collections import defaultdict
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings, target
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lori.merge_options import MergeOptions
from server.engine.adapters.cache import AdapterCache
from server.engine.engine import Engine
from server.engine.model.runner import Runner
from server.engine.request import AdapterTerm, Chunk, DoneEvent, ErrorEvent, Event, Request, SamplingParams, Sequence
from server.engine.scheduling.kv_cache import KvCache
from server.engine.scheduling.scheduler import Scheduler
from tests.server.engine.scheduling.test_schedules import FakeMemory
from tests.server.fake_loads import SCALE, FakeLoader, FakePool, fake_cache
from tests.server.plans import request, step_limits
from tests.server.rig import EOS

MAX_STEPS = 3000
SLOT_BYTES = 10
BAD, HUGE, FLAKY = "bad", "huge", "flaky"
"""An adapter that cannot be read, one that is too large, and one that can be read every second time."""


@dataclass(frozen=True)
class Arrival:
    """A request, the step in which it arrives, when its client leaves, and the outputs after which the model fails."""

    step: int
    request: Request
    cancelled_after: int | None
    throws_after: int | None
    overflows_after: int | None
    ends_after: int | None
    """Number of outputs before the stop token."""


@dataclass(frozen=True)
class Schedule:
    """The arrivals, and the scarce resources of the engine."""

    num_blocks: int
    block_size: int
    max_sequences: int
    max_prompt_tokens: int
    num_slots: int
    max_loaded_bytes: int
    max_delay: int
    max_loading: int
    max_merging: int
    arrivals: list[Arrival]


def size_of(digest: str) -> int:
    return SLOT_BYTES * 100 if digest == HUGE else 1 + int(digest) % 3 if digest.isdigit() else 2


ADAPTERS = st.lists(st.integers(0, 29).map(str), max_size=5, unique=True)
SOMETIMES_BAD = st.one_of(
    ADAPTERS.map(lambda names: [*names[:2], BAD]), ADAPTERS.map(lambda names: [*names[:2], FLAKY]), st.just([HUGE])
)
POLICIES = st.sampled_from([(), (), ("30",), ("30", "31")])
NEVER = st.none()
RARELY = st.one_of(NEVER, NEVER, NEVER, st.integers(0, 6))


@st.composite
def arrivals(draw: st.DrawFn, capacity: int) -> Arrival:
    num_prompt = draw(st.integers(1, min(capacity, 20)))
    names = draw(st.one_of(st.just([]), ADAPTERS, ADAPTERS, ADAPTERS, SOMETIMES_BAD))
    new_request = request(
        num_prompt,
        draw(st.integers(0, min(9, capacity - num_prompt))),
        adapters=names,
        weight=draw(st.sampled_from([1.0, 0.5, 0.0])),
        num_choices=draw(st.sampled_from([1, 1, 1, 2, 3])),
        priority=draw(st.sampled_from([0, 0, 1])),
        tenant=draw(st.sampled_from("tu")),
        is_scored=draw(st.sampled_from([False, False, True])),
    )
    text = draw(st.integers(0, 1))
    alias = [AdapterTerm("alias", term.digest, 0.25) for term in new_request.terms[:1] if draw(st.booleans())]
    new_request = replace(
        new_request,
        terms=(*new_request.terms, *alias),
        prompt_text="x" * num_prompt,
        prompt_ids=tuple(text * 100 + place for place in range(num_prompt)),
        sampling=SamplingParams(temperature=draw(st.sampled_from([0.0, 1e-9])), seed=draw(st.integers(0, 3))),
        merge=draw(st.sampled_from([MergeOptions(), MergeOptions(), MergeOptions("ties")])),
        policy=tuple(AdapterTerm(digest, digest, 0.5) for digest in draw(POLICIES)),
        timeout_s=draw(st.one_of(NEVER, NEVER, st.integers(0, 40).map(float))),
    )
    cancelled_after = draw(st.one_of(NEVER, NEVER, st.integers(0, 30)))
    return Arrival(draw(st.integers(0, 12)), new_request, cancelled_after, draw(RARELY), draw(RARELY), draw(RARELY))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    num_blocks, block_size = draw(st.integers(2, 14)), draw(st.integers(1, 4))
    drawn = draw(st.lists(arrivals(num_blocks * block_size), min_size=1, max_size=8))
    return Schedule(
        num_blocks,
        block_size,
        draw(st.integers(1, 5)),
        draw(st.integers(1, 16)),
        draw(st.integers(1, 8)),
        draw(st.sampled_from([0, 3, 100])),
        draw(st.integers(0, 5)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 2)),
        [replace(arrival, request=replace(arrival.request, id=f"{place}")) for place, arrival in enumerate(drawn)],
    )


def token_of(arrival: Arrival, choice: int, num_outputs: int) -> int:
    """Return the token of the fake model after `num_outputs` outputs. It does not depend on the batch."""
    return EOS if num_outputs == arrival.ends_after else 100 + (num_outputs * 7 + choice) % 13


class FakeRunner:
    """A runner that checks the source of each place of the KV memory, and the adapter in each slot."""

    def __init__(self, schedule: Schedule, slots: dict[int, str]) -> None:
        self._memory, self._slots = FakeMemory(schedule.block_size), slots
        self._arrivals = {arrival.request.id: arrival for arrival in schedule.arrivals}

    def is_broken(self, _: Exception) -> bool:
        return False

    def forward(self, chunks: Items[Chunk], positions: Items[int]) -> torch.Tensor:
        for chunk in chunks:
            if len(chunk.sequence.output_ids) == self._arrival(chunk).throws_after:
                raise ValueError("thrown")
        for chunk in chunks:
            self._memory.compute(chunk)
            terms = [(self._slots[slot], weight / SCALE) for slot, weight in chunk.sequence.terms or ()]
            assert tuple(terms) == chunk.sequence.residents, "the adapters of the sequence are in its slots"
        sources = [(chunk, place) for chunk in chunks for place in range(chunk.start, chunk.stop)]
        logits = torch.zeros(len(positions), EOS + 1)
        for row, (chunk, place) in enumerate(sources[position] for position in positions):
            num_outputs = max(0, place + 1 - len(chunk.sequence.request.prompt_ids))
            logits[row, token_of(self._arrival(chunk), chunk.sequence.choice, num_outputs)] = 9.0
            if len(chunk.sequence.output_ids) == self._arrival(chunk).overflows_after:
                logits[row] = torch.nan
        return logits

    def _arrival(self, chunk: Chunk) -> Arrival:
        return self._arrivals[chunk.sequence.request.id]


@dataclass
class Run:
    """The run of a schedule. Its engine sleeps where the engine's thread would sleep: only an event wakes it."""

    schedule: Schedule
    engine: Engine
    loader: FakeLoader
    step: int = 0
    heard: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    sequences: dict[str, list[Sequence]] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    """Steps until each pending load arrives."""

    def go(self) -> None:
        self.engine.clock = lambda: float(self.step)
        self.engine.adapter_cache.on_arrival(self.engine.wake)
        while (
            self.step <= max(arrival.step for arrival in self.schedule.arrivals)
            or self.engine.scheduler.has_work
            or self.loader.pending
        ):
            assert self.step < MAX_STEPS, "a request waits for ever"
            self.arrive()
            self.leave()
            self.read()
            if self.engine.can_step or self.engine.time_left() == 0:
                self.engine.step()
                self.engine.scheduler.check_integrity()
                self.engine.adapter_cache.check_integrity([*self.engine.scheduler.running])
            self.check_no_request_is_late()
            self.step += 1

    def arrive(self) -> None:
        for arrival in self.schedule.arrivals:
            if arrival.step == self.step:
                before = {*self.engine.scheduler.waiting}
                self.engine.submit(arrival.request, self.heard[arrival.request.id].append)
                self.sequences[arrival.request.id] = [s for s in self.engine.scheduler.waiting if s not in before]

    def leave(self) -> None:
        for arrival in self.schedule.arrivals:
            if arrival.cancelled_after is not None and arrival.step + arrival.cancelled_after == self.step:
                self.engine.abort(arrival.request.id)

    def read(self) -> None:
        for digest in [*self.loader.pending]:
            left = self.loads.setdefault(digest, sum(map(ord, digest)) % (self.schedule.max_delay + 1))
            if left:
                self.loads[digest] -= 1
                continue
            del self.loads[digest]
            names = {term.name for term in self.loader.pending[digest].terms if not digest.isdigit()}
            is_bad = BAD in names or (FLAKY in names and self.loader.started.count(digest) % 2 == 0)
            self.loader.arrive(digest, size_of(digest), "it is torn" if is_bad else "")

    def check_no_request_is_late(self) -> None:
        for arrival in self.schedule.arrivals:
            request, age = arrival.request, self.step - arrival.step
            is_over = arrival.cancelled_after is not None and age >= arrival.cancelled_after
            is_over |= request.timeout_s is not None and age >= request.timeout_s
            assert not (age >= 0 and is_over and request.id in self.engine._by_id), (
                "a request ends at once when it is cancelled or its time is up"
            )

    def check_nothing_is_left(self) -> None:
        engine = self.engine
        engine.step()
        assert not engine._replies
        assert not engine._by_id
        assert not engine.scheduler.has_work
        assert engine.scheduler.kv_cache.num_available == engine.scheduler.kv_cache.num_blocks
        assert engine.adapter_cache.residents.num_in_use == 0
        assert not engine.adapter_cache._waiters
        assert not engine.adapter_cache._failed
        assert engine.adapter_cache.num_loaded_bytes <= self.schedule.max_loaded_bytes
        assert engine.time_left() is None

    def check(self, arrival: Arrival) -> None:
        """Check that a request received all its events, and none after the last one."""
        request, events = arrival.request, self.heard[arrival.request.id]
        errors = [event for event in events if isinstance(event, ErrorEvent)]
        ends = [event for event in events if isinstance(event, DoneEvent)]
        assert errors == events[-1:] if errors else sorted(e.choice for e in ends) == list(range(request.sampling.num_choices))
        for error in errors:
            assert self.may_fail(arrival)[error.kind], error
        for end in ends:
            own = [event for event in events if not isinstance(event, ErrorEvent) and event.choice == end.choice]
            assert own[-1] is end
            expected = [token_of(arrival, end.choice, place) for place in range(request.max_tokens)]
            expected = expected[: expected.index(EOS) + 1] if EOS in expected else expected
            tokens = self.sequences[request.id][end.choice].output_ids
            if end.finish_reason == "cancelled":
                assert arrival.cancelled_after is not None
                assert tokens == expected[: len(tokens)]
            else:
                assert end.finish_reason == ("stop" if EOS in expected else "length")
                assert tokens == expected
                assert end.num_completion_tokens == len(tokens)

    def may_fail(self, arrival: Arrival) -> dict[str, bool]:
        residents = {digest for digest, _ in arrival.request.residents}
        num_bytes = sum(map(size_of, residents))
        is_too_much = len(residents) > self.schedule.num_slots or num_bytes > SLOT_BYTES
        is_bad = bool(residents) and any(term.name in (BAD, FLAKY) for term in arrival.request.terms)
        return {
            "engine": arrival.throws_after is not None or arrival.overflows_after is not None,
            "adapter": is_too_much or is_bad,
            "timeout": arrival.request.timeout_s is not None,
        }


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(schedules())
def run_any_schedules(tokenizer: PreTrainedTokenizerFast, seen: dict[str, int], schedule: Schedule) -> None:
    """Run schedules to their ends, and count in `seen` how often each kind of end occurred."""
    loader = FakeLoader()
    places = {"max_loading": schedule.max_loading, "max_merging": schedule.max_merging}
    adapter_cache: AdapterCache = fake_cache(loader, schedule.num_slots, SLOT_BYTES, schedule.max_loaded_bytes, **places)
    limits = step_limits(schedule.max_sequences, schedule.max_sequences + schedule.max_prompt_tokens)
    scheduler = Scheduler(KvCache(schedule.num_blocks, schedule.block_size, "base"), adapter_cache, limits)
    runner = cast(Runner, FakeRunner(schedule, cast(FakePool, adapter_cache._pool).slots))
    run = Run(schedule, Engine(scheduler, runner, adapter_cache, tokenizer.backend_tokenizer, [EOS]), loader)
    run.go()
    run.check_nothing_is_left()
    for arrival in schedule.arrivals:
        run.check(arrival)
        last = run.heard[arrival.request.id][-1]
        seen[last.kind if isinstance(last, ErrorEvent) else cast(DoneEvent, last).finish_reason] += 1
    seen["preempted"] += scheduler.num_preemptions
    target(scheduler.num_preemptions, label="preemptions")  # the rarest kind: without a target some runs have hardly one
    seen["evicted"] += adapter_cache.residents.num_evictions
    seen["read again"] += len(loader.started) - len({*loader.started})


@pytest.mark.slow
def test_any_schedule_ends_and_leaves_nothing_behind(tokenizer: PreTrainedTokenizerFast) -> None:
    """With scarce resources, choices, cancels, deadlines, slow and bad loads, adapters that never fit, and steps that raise."""
    seen: dict[str, int] = defaultdict(int)
    run_any_schedules(tokenizer, seen)
    kinds = ("length", "stop", "cancelled", "engine", "adapter", "timeout", "preempted", "evicted", "read again")
    assert {kind for kind in kinds if seen[kind] < 20} == set(), "every kind has to occur often enough to be tested"
