"""Scheduler: the sequences that run in a step, and the chunk of each."""

from typing import NoReturn

import pytest

from server.engine.request import Sequence
from server.engine.scheduling.step_budget import MIN_CHUNK_TOKENS
from tests.server.plans import FakeGate, added, num_tokens, request, run, run_step, scheduler, spans, step_cost, step_limits


def test_a_prompt_longer_than_the_budget_is_chunked() -> None:
    it = scheduler(max_tokens=8)
    one = added(it, request(19, 2))
    assert [spans(chunks) for chunks in run(it)] == [[(one, 0, 8)], [(one, 8, 16)], [(one, 16, 19)], [(one, 19, 20)]]
    assert one.output_ids == [7, 7]


def test_only_the_chunk_that_ends_a_sequence_is_sampled_from() -> None:
    it = scheduler(max_tokens=8)
    added(it, request(10))
    (first,) = it.plan()
    assert not first.is_last
    it.commit(first, None)
    (second,) = it.plan()
    assert second.is_last


def test_nothing_is_sampled_for_a_request_without_output() -> None:
    it = scheduler()
    added(it, request(4, 0))
    (chunk,) = it.plan()
    assert (chunk.start, chunk.stop, chunk.is_last) == (0, 4, False)


def test_decoding_comes_first_and_prompts_alternate_in_the_rest_of_the_budget() -> None:
    it = scheduler(max_tokens=8)
    long = added(it, request(30))
    short = added(it, request(3, text=1))
    assert spans(run_step(it)) == [(short, 0, 3), (long, 0, 5)]
    assert spans(run_step(it)) == [(short, 3, 4), (long, 5, 12)]
    late = added(it, request(9, text=2))
    assert spans(run_step(it)) == [(short, 4, 5), (late, 0, 7)]
    assert spans(run_step(it)) == [(short, 5, 6), (long, 12, 19)]
    assert spans(run_step(it)) == [(late, 7, 9), (long, 19, 25)]
    assert spans(run_step(it)) == [(late, 9, 10), (long, 25, 30)]


def test_a_prompt_chunk_of_one_token_comes_first() -> None:
    it = scheduler(max_tokens=8)
    added(it, request(7))
    added(it, request(7, text=1))
    assert [(c.stop - c.start) for c in it.plan()] == [1, 7]


def test_of_running_prompts_the_lower_priority_number_is_computed_first() -> None:
    it = scheduler(max_tokens=8)
    late = added(it, request(20, priority=1))
    run_step(it)
    early = added(it, request(30, text=1))
    assert [spans(run_step(it)) for _ in range(3)] == [[(early, start, start + 8)] for start in (0, 8, 16)]
    assert spans(run_step(it)) == [(early, 24, 30), (late, 8, 10)]


def test_short_prompts_of_a_lower_priority_make_no_step_longer() -> None:
    it = scheduler(200, max_tokens=64, max_stall=1.5, short_step_s=50.0, cost=step_cost(free_tokens=20))
    one = added(it, request(2, 50))
    run_step(it)
    added(it, request(20, 1, text=1, priority=1))
    early = added(it, request(300, 1, text=2))
    assert spans(run_step(it)) == [(one, 2, 3), (early, 0, 9)]


def test_a_long_prompt_stalls_no_decoding() -> None:
    it = scheduler(max_tokens=8)
    one = added(it, request(2, 10))
    run_step(it)
    added(it, request(60, text=1))
    for count in range(1, 9):
        chunks = run_step(it)
        assert chunks[0].sequence is one
        assert num_tokens(chunks) == 8
        assert len(one.output_ids) == count + 1


@pytest.mark.parametrize(
    ("max_stall", "free_tokens", "num_prompt_tokens"),
    [(2.0, 10, 12), (1.5, 10, 6), (2.0, 0, 4), (1.0, 10, 4), (1.01, 0, 4), (2.0, 500, 62), (float("inf"), 0, 62)],
)
def test_prompts_beside_decoding_lengthen_a_step_by_no_more_than_the_greatest_stall(
    max_stall: float, free_tokens: int, num_prompt_tokens: int
) -> None:
    it = scheduler(max_tokens=64, max_stall=max_stall, cost=step_cost(free_tokens))
    for text in (0, 1):
        added(it, request(2, 50, text=text))
    run_step(it)
    added(it, request(200, text=2))
    assert num_tokens(run_step(it)) == 2 + num_prompt_tokens


def test_chunks_become_shorter_the_more_keys_they_read() -> None:
    cost = step_cost(free_tokens=50, per_key=0.01, per_pair=0.01)
    it = scheduler(400, max_tokens=64, max_stall=2.0, cost=cost)
    added(it, request(2, 200))
    run_step(it)
    long = added(it, request(1000, 1, text=1))
    sizes = [c.stop - c.start for chunks in run(it) for c in chunks if c.sequence is long]
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert sizes[0] == 41
    assert sizes[-2] == MIN_CHUNK_TOKENS + 1, "a prompt reaches its end, whatever a step costs"


def prompts_beside_decoding(*sizes: int) -> tuple[list[Sequence], list[list[Sequence]]]:
    """Return prompts that arrive together where decoding leaves little room, and the prompts that each step computes."""
    it = scheduler(400, max_tokens=64, max_stall=1.5, cost=step_cost(free_tokens=20))
    added(it, request(2, 200))
    run_step(it)
    prompts = [added(it, request(size, 1, text=text)) for text, size in enumerate(sizes, 1)]
    return prompts, [[c.sequence for c in chunks if c.sequence in prompts] for chunks in run(it)]


def test_a_prompt_waits_for_an_earlier_one_of_the_same_length() -> None:
    (first, second), steps = prompts_beside_decoding(30, 30)
    assert max(step for step, computed in enumerate(steps) if first in computed) <= min(
        step for step, computed in enumerate(steps) if second in computed
    )


def test_a_short_prompt_has_every_other_step_beside_a_long_one() -> None:
    (_, short), steps = prompts_beside_decoding(500, 30)
    short_steps = [step for step, computed in enumerate(steps) if short in computed]
    assert short_steps[-1] <= 2 * len(short_steps)
    assert len(steps) > 40


def test_a_long_prompt_has_every_other_step_beside_endless_shorter_ones() -> None:
    it = scheduler(1000, max_tokens=64, max_stall=1.5, cost=step_cost(free_tokens=20))
    added(it, request(2, 400))
    run_step(it)
    long = added(it, request(1000, 1, text=1))
    computed = []
    for text in range(2, 100):
        added(it, request(10, 1, text=text))
        computed.append(long in [c.sequence for c in run_step(it)])
    assert computed[1:].count(True) >= len(computed[1:]) // 2


def test_short_prompts_may_make_a_step_take_longer_than_the_greatest_stall() -> None:
    """With two prompts beside one decoding request, a step may take three times `short_step_s`."""
    it = scheduler(max_tokens=64, max_stall=1.5, short_step_s=50 / 3, cost=step_cost(free_tokens=20))
    one = added(it, request(2, 50))
    run_step(it)
    first, second = added(it, request(20, 1, text=1)), added(it, request(20, 1, text=2))
    assert spans(run_step(it)) == [(one, 2, 3), (first, 0, 20), (second, 0, 9)]
    assert spans(run_step(it)) == [(one, 3, 4), (second, 9, 20)]


def test_a_prompt_that_stalls_no_decoding_has_the_whole_budget() -> None:
    it = scheduler(max_tokens=64, max_stall=1.0)
    added(it, request(200))
    assert num_tokens(run_step(it)) == 64


def test_a_step_must_have_room_for_a_prompt() -> None:
    with pytest.raises(AssertionError):
        step_limits(8, 8)


def test_no_more_sequences_run_than_the_limit() -> None:
    it = scheduler(max_sequences=2)
    sequences = [added(it, request(1, 1)) for _ in range(3)]
    assert [c.sequence for c in run_step(it)] == sequences[:2]
    assert [c.sequence for c in run_step(it)] == sequences[2:]


def test_the_gate_is_not_asked_while_all_places_are_taken() -> None:
    gate = FakeGate()
    it = scheduler(max_sequences=2, gate=gate)
    for _ in range(10):
        added(it, request(1, 3))
    run_step(it)
    assert len(gate.asked) == 2
    run_step(it)
    assert len(gate.asked) == 2


def test_no_sequence_overtakes_the_first_that_waits_for_memory() -> None:
    it = scheduler(num_blocks=4)
    added(it, request(7, 4))  # 2 blocks, so 2 are left
    large = added(it, request(10, 4, text=1))  # 3 blocks
    small = added(it, request(1, 1, text=2))  # would fit
    run_step(it)
    assert list(it.waiting) == [large, small]


def test_a_sequence_takes_the_blocks_of_its_tokens_and_not_of_all_that_it_may_grow_to() -> None:
    it = scheduler(num_blocks=16, max_tokens=16)
    one = added(it, request(9, 50))
    run_step(it)
    assert len(one.blocks) == 3
    for _ in range(4):
        run_step(it)
    assert (one.num_tokens, len(one.blocks)) == (14, 4)


def test_a_sequence_that_joins_leaves_a_block_for_each_running_one() -> None:
    it = scheduler(num_blocks=4)
    added(it, request(8, 4))
    late = added(it, request(5, 3, text=1))
    run_step(it)
    assert late in it.waiting
    assert it.kv_cache.num_available == 2


def test_a_sequence_of_all_the_memory_runs() -> None:
    it = scheduler(num_blocks=4)
    one = added(it, request(10, 6))
    run(it)
    assert len(one.output_ids) == 6


def test_a_sequence_that_can_never_run_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError):
        added(scheduler(num_blocks=4), request(10, 7))


def test_a_prompt_that_was_computed_before_is_not_computed_again() -> None:
    it = scheduler(max_tokens=64)
    added(it, request(18, 1))
    run(it)
    again = added(it, request(18, 1))
    assert [spans(chunks) for chunks in run(it)] == [[(again, 16, 18)]]
    assert again.num_cached == 16


def test_chunks_that_were_not_committed_are_never_found() -> None:
    it = scheduler(max_tokens=8)
    broken = added(it, request(20))
    run_step(it)
    (chunk,) = it.plan()
    assert (chunk.start, chunk.stop) == (8, 16)
    it.finish(broken)
    again = added(it, request(20))
    assert spans(it.plan()) == [(again, 8, 16)]


def test_aborting_a_running_sequence_frees_its_blocks() -> None:
    it = scheduler(num_blocks=4)
    one = added(it, request(12, 4))
    other = added(it, request(text=1))
    run_step(it)
    it.abort(one)
    assert it.drop_aborted() == [one]
    it.check_integrity()
    assert it.kv_cache.num_available == 4
    assert [c.sequence for c in it.plan()] == [other]


def test_aborting_a_waiting_sequence_lets_the_next_one_in() -> None:
    it = scheduler(num_blocks=4)
    running = added(it, request(7, 4))
    large = added(it, request(10, 4, text=1))
    small = added(it, request(1, 1, text=2))
    run_step(it)
    it.abort(large)
    assert it.drop_aborted() == [large]
    assert [c.sequence for c in run_step(it)] == [running, small]
    assert it.drop_aborted() == []


def test_sequences_past_their_deadline_are_dropped_whether_they_wait_or_run() -> None:
    it = scheduler(max_sequences=1)
    running = added(it, deadline=2.0)
    waiting = added(it, deadline=1.0)
    never = added(it)
    ended = added(it, request(1, 0, priority=-1), deadline=1.5)
    run_step(it)
    run_step(it)
    assert ended not in it.waiting
    assert it.next_deadline == 1.0
    assert it.drop_expired(1.9) == [waiting]
    assert it.next_deadline == 2.0
    assert it.drop_expired(2.0) == [running]
    assert it.next_deadline is None
    assert it.has_work
    run(it)
    assert len(never.output_ids) == 4


class Unsearched(dict[Sequence, None]):
    """A dict that fails when it is iterated over."""

    def __iter__(self) -> NoReturn:
        raise AssertionError("a step should not iterate over the waiting sequences")


def test_aborted_sequences_are_dropped_without_a_search_through_the_others() -> None:
    it = scheduler(max_sequences=1)
    first, second, third, ended = (added(it, request(max_tokens=m)) for m in (4, 5, 6, 7))
    run_step(it)
    it.waiting = Unsearched(it.waiting)
    for sequence in (third, first, ended):
        it.abort(sequence)
    it.finish(ended)
    assert it.drop_aborted() == [third, first]
    assert it.drop_aborted() == []
    it.waiting = {second: None}
    it.check_integrity()
    assert [c.sequence for c in run_step(it)] == [second]


def test_integrity_notices_a_lost_block() -> None:
    it = scheduler()
    one = added(it)
    it.plan()
    one.blocks.pop()
    with pytest.raises(AssertionError):
        it.check_integrity()
