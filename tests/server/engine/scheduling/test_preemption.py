"""Preemption: when KV memory runs out, the sequence that joined last gives up its blocks, and all sequences still end."""

import pytest

from tests.server.plans import FakeGate, added, added_choices, request, run, run_step, scheduler


def test_the_sequence_that_joined_last_is_recomputed_later_and_keeps_its_output() -> None:
    gate = FakeGate()
    it = scheduler(num_blocks=6, max_tokens=64, gate=gate)
    first = added(it, request(8, 12))
    second = added(it, request(8, 12, text=1, adapters=["a"]))
    run_step(it)
    while second in it.running:
        run_step(it)
    assert it.num_preemptions == second.num_preemptions == 1
    assert first.num_preemptions == 0
    assert (second.blocks, second.num_computed) == ([], 0)
    assert list(gate.held) == [first]
    before = list(second.output_ids)
    assert before
    run(it)
    assert len(first.output_ids) == len(second.output_ids) == 12
    assert second.output_ids[: len(before)] == before
    assert not gate.held


def test_a_step_has_no_chunk_of_a_sequence_that_it_preempted() -> None:
    it = scheduler(num_blocks=6, max_tokens=64)
    first, second = added(it, request(8, 12)), added(it, request(8, 12, text=1))
    run_step(it)
    while not it.num_preemptions:
        chunks = it.plan()
        for chunk in chunks:
            it.commit(chunk, 7)
    assert [c.sequence for c in chunks] == [first]
    assert list(it.waiting) == [second]


def test_blocks_of_a_preempted_sequence_are_found_again_if_no_other_took_them() -> None:
    it = scheduler(num_blocks=8, max_tokens=64)
    first, second = added(it, request(12, 8)), added(it, request(12, 8, text=1))
    run_step(it)
    while second in it.running:
        run_step(it)
    it.finish(first)
    (chunk,) = it.plan()
    assert chunk.sequence is second
    assert chunk.start >= 12


def test_the_lowest_priority_is_preempted_first_whenever_it_joined() -> None:
    it = scheduler(num_blocks=8, max_tokens=64)
    low = added(it, request(8, 20, priority=9))
    run_step(it)
    high = added(it, request(8, 20, text=1, priority=0))
    run_step(it)
    while not it.num_preemptions:
        run_step(it)
    assert list(it.running) == [high]
    assert low.num_preemptions == 1
    run(it)
    assert high.num_preemptions == 0


def test_a_preempted_sequence_is_not_readmitted_at_once() -> None:
    it = scheduler(num_blocks=6, max_tokens=64)
    added(it, request(8, 12))
    added(it, request(8, 12, text=1))
    steps = run(it)
    assert it.num_preemptions == 1, "a sequence readmitted at once would have been preempted again"
    assert len(steps) < 30


def test_a_preempted_sequence_goes_before_the_others_of_its_flow() -> None:
    it = scheduler(num_blocks=6, max_tokens=64, max_sequences=2)
    first, second = added(it, request(8, 12)), added(it, request(8, 12, text=1))
    third = added(it, request(4, 1, text=2))
    while first in it.running or first in it.waiting:
        run_step(it)
        assert third not in it.running or second not in it.waiting
    assert second.num_preemptions, "the second has to be preempted while the third waits"
    run(it)


def test_recomputed_tokens_are_not_charged_again() -> None:
    it = scheduler(num_blocks=6, max_tokens=64)
    added(it, request(8, 12, tenant="a"))
    second = added(it, request(8, 12, text=1, tenant="b"))
    while not it.num_preemptions or second in it.waiting:
        run_step(it)
    assert it.tokens_charged[("b", ())] == 8 + len(second.output_ids)


def test_the_choice_that_computes_the_prompt_goes_on_after_a_preemption() -> None:
    it = scheduler(num_blocks=9, max_tokens=3, max_sequences=2)
    first = added(it, request(8, 20))
    while not first.output_ids:
        run_step(it)
    choices = added_choices(it, request(20, 2, text=1, num_choices=2))
    while first in it.running:
        run_step(it)
    assert choices[0].num_preemptions
    run(it)
    assert [len(s.output_ids) for s in choices] == [2, 2]


@pytest.mark.parametrize("num_sequences", [2, 3, 8])
def test_all_sequences_end_however_little_memory_there_is(num_sequences: int) -> None:
    it = scheduler(num_blocks=5, max_sequences=8, max_tokens=16)
    sequences = [added(it, request(4, 16, text=text)) for text in range(num_sequences)]
    run(it)
    assert all(len(s.output_ids) == 16 for s in sequences)
