"""Which sequences run in a step, and how much of each."""

import random

import pytest

from server.engine.kv_cache import BlockAllocator
from server.engine.request import Sequence
from server.engine.scheduler import Chunk, Scheduler
from tests.server.rig import request


def scheduler(num_blocks: int = 64, max_sequences: int = 4, max_step_tokens: int = 8) -> Scheduler:
    return Scheduler(BlockAllocator(num_blocks, 4), max_sequences, max_step_tokens)


def added(to: Scheduler, num_prompt: int = 4, max_tokens: int = 4) -> Sequence:
    sequence = Sequence(request(num_prompt, max_tokens))
    to.add(sequence)
    return sequence


def spans(chunks: list[Chunk]) -> list[tuple[Sequence, int, int]]:
    return [(c.sequence, c.start, c.stop) for c in chunks]


def run_step(of: Scheduler) -> list[Chunk]:
    """Plans a step and commits it with token 7 where one is to be sampled; a sequence with all its tokens leaves."""
    chunks = of.plan()
    for chunk in chunks:
        of.commit(chunk, 7 if chunk.is_last else None)
        sequence = chunk.sequence
        if len(sequence.output_ids) == sequence.request.max_tokens and sequence.num_computed >= len(sequence.request.prompt_ids):
            of.finish(sequence)
    of.check_integrity()
    return chunks


def test_a_prompt_longer_than_the_budget_is_chunked() -> None:
    it = scheduler(max_step_tokens=8)
    one = added(it, num_prompt=19, max_tokens=2)
    steps = [run_step(it) for _ in range(4)]
    assert [spans(chunks) for chunks in steps] == [[(one, 0, 8)], [(one, 8, 16)], [(one, 16, 19)], [(one, 19, 20)]]
    assert one.output_ids == [7, 7]
    assert not it.has_work


def test_only_the_chunk_that_ends_a_sequence_is_sampled_from() -> None:
    it = scheduler(max_step_tokens=8)
    added(it, num_prompt=10)
    (first,) = it.plan()
    assert not first.is_last
    it.commit(first, None)
    (second,) = it.plan()
    assert second.is_last


def test_nothing_is_sampled_for_a_request_without_output() -> None:
    it = scheduler()
    added(it, num_prompt=4, max_tokens=0)
    (chunk,) = it.plan()
    assert (chunk.start, chunk.stop, chunk.is_last) == (0, 4, False)


def test_decoding_comes_first_and_prompts_share_what_is_left_in_order_of_arrival() -> None:
    it = scheduler(max_step_tokens=8)
    long = added(it, num_prompt=30)
    short = added(it, num_prompt=3)
    assert spans(run_step(it)) == [(long, 0, 8)]
    for start in (8, 16):
        assert spans(run_step(it)) == [(long, start, start + 8)]
    assert spans(run_step(it)) == [(long, 24, 30), (short, 0, 2)]
    late = added(it, num_prompt=9)
    assert spans(run_step(it)) == [(long, 30, 31), (short, 2, 3), (late, 0, 6)]
    assert spans(run_step(it)) == [(long, 31, 32), (short, 3, 4), (late, 6, 9)]


def test_a_long_prompt_stalls_no_decoding() -> None:
    it = scheduler(max_step_tokens=8)
    one = added(it, num_prompt=2, max_tokens=10)
    run_step(it)
    added(it, num_prompt=60)
    for count in range(1, 9):
        chunks = run_step(it)
        assert chunks[0].sequence is one
        assert sum(c.stop - c.start for c in chunks) == 8
        assert len(one.output_ids) == count + 1


def test_no_more_than_the_greatest_number_runs() -> None:
    it = scheduler(max_sequences=2)
    sequences = [added(it, num_prompt=1, max_tokens=1) for _ in range(3)]
    assert [c.sequence for c in run_step(it)] == sequences[:2]
    assert [c.sequence for c in run_step(it)] == sequences[2:]


def test_a_sequence_waits_until_memory_holds_all_that_it_can_grow_to() -> None:
    it = scheduler(num_blocks=4)  # 16 tokens
    first = added(it, num_prompt=4, max_tokens=6)  # 3 blocks
    second = added(it, num_prompt=1, max_tokens=4)  # 2 blocks
    while first in it.running or not first.output_ids:
        assert [c.sequence for c in run_step(it)] == [first]
        assert list(it.waiting) == [second]
    assert [c.sequence for c in run_step(it)] == [second]


def test_nobody_overtakes_the_first_that_waits() -> None:
    it = scheduler(num_blocks=4)
    added(it, num_prompt=4, max_tokens=4)  # 2 blocks, so 2 are left
    large = added(it, num_prompt=8, max_tokens=4)  # 3 blocks
    small = added(it, num_prompt=1, max_tokens=1)  # would fit
    run_step(it)
    assert list(it.waiting) == [large, small]


def test_a_sequence_of_all_the_memory_runs() -> None:
    it = scheduler(num_blocks=4)
    one = added(it, num_prompt=10, max_tokens=6)
    while it.has_work:
        run_step(it)
    assert len(one.output_ids) == 6
    assert it.allocator.num_free == 4


def test_aborting_a_running_sequence_frees_its_blocks() -> None:
    it = scheduler(num_blocks=4)
    one = added(it, num_prompt=12, max_tokens=4)
    other = added(it)
    run_step(it)
    assert it.allocator.num_free == 0
    one.is_aborted = True
    assert it.drop_aborted() == [one]
    it.check_integrity()
    assert it.allocator.num_free == 4
    assert [c.sequence for c in it.plan()] == [other]


def test_aborting_a_waiting_sequence_lets_the_next_one_in() -> None:
    it = scheduler(num_blocks=4)
    running = added(it, num_prompt=4, max_tokens=4)
    large = added(it, num_prompt=8, max_tokens=4)
    small = added(it, num_prompt=1, max_tokens=1)
    run_step(it)
    large.is_aborted = True
    assert it.drop_aborted() == [large]
    assert not it.waiting or list(it.waiting) == [small]
    assert [c.sequence for c in run_step(it)] == [running, small]
    assert it.drop_aborted() == []


def test_integrity_notices_a_lost_block() -> None:
    it = scheduler()
    one = added(it)
    it.plan()
    one.blocks.pop()
    with pytest.raises(AssertionError):
        it.check_integrity()


@pytest.mark.parametrize("seed", range(40))
def test_any_schedule_keeps_its_promises(seed: int) -> None:
    """Random arrivals, lengths and aborts: each step keeps to its budget, all end, and every block is free again."""
    rng = random.Random(seed)
    max_sequences = rng.randint(1, 6)
    it = Scheduler(BlockAllocator(rng.randint(8, 40), rng.randint(1, 6)), max_sequences, max_sequences + rng.randint(1, 20))
    capacity = it.allocator.num_blocks * it.allocator.block_size
    arrived: list[Sequence] = []
    joined: list[Sequence] = []
    ended: list[Sequence] = []
    num_steps = 0
    while num_steps < 60 or it.has_work:
        num_steps += 1
        assert num_steps < 5000
        for _ in range(rng.randint(0, 3) if num_steps < 60 else 0):
            num_prompt = rng.randint(1, capacity)
            arrived.append(added(it, num_prompt, rng.randint(0, min(12, capacity - num_prompt))))
        if rng.random() < 0.2 and it.has_work:
            rng.choice([*it.waiting, *it.running]).is_aborted = True
        ended += it.drop_aborted()
        chunks = it.plan()
        joined += [s for s in it.running if s not in joined]
        assert bool(chunks) == it.has_work, "while there is work, some of it is done"
        assert sum(c.stop - c.start for c in chunks) <= it.max_step_tokens
        assert len(it.running) <= max_sequences
        sizes = [c.stop - c.start for c in chunks]
        assert all(size == 1 for size in sizes[: sum(c.start >= len(c.sequence.request.prompt_ids) for c in chunks)])
        assert {s for s in it.running if s.output_ids} <= {c.sequence for c in chunks}, "all that decode do so in every step"
        owned = [block for s in it.running for block in s.blocks]
        assert len(owned) == len(set(owned))
        for chunk in chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.num_computed < chunk.stop <= sequence.num_tokens
            assert chunk.stop <= len(sequence.blocks) * it.allocator.block_size
            it.commit(chunk, 7 if chunk.is_last else None)
            if sequence.num_computed >= len(sequence.request.prompt_ids) and (
                len(sequence.output_ids) == sequence.request.max_tokens or rng.random() < 0.05
            ):
                it.finish(sequence)
                ended.append(sequence)
        it.check_integrity()
    assert joined == [s for s in arrived if s in joined], "first come, first served"
    assert set(ended) == set(arrived)
    assert len(ended) == len(arrived)
    it.check_integrity()
    assert it.allocator.num_free == it.allocator.num_blocks
