"""Choices of one request: they share its prompt, which one of them computes."""

import pytest

from tests.server.plans import added, added_choices, request, run, run_step, scheduler, spans


def test_the_prompt_of_several_choices_is_computed_once() -> None:
    it = scheduler(max_sequences=8, max_tokens=64)
    choices = added_choices(it, request(18, 3, num_choices=3))
    assert it.num_waiting == 3
    assert spans(run_step(it)) == [(choices[0], 0, 18)]
    assert spans(run_step(it)) == [(choices[0], 18, 19), (choices[1], 16, 18), (choices[2], 16, 18)]
    assert choices[1].blocks[:4] == choices[2].blocks[:4] == choices[0].blocks[:4]
    assert len({s.blocks[4] for s in choices}) == 3
    run(it)
    assert [s.output_ids for s in choices] == [[7] * 3] * 3


def test_choices_that_wait_for_the_prompt_block_no_other_sequence() -> None:
    it = scheduler(max_tokens=8)
    first, second = added_choices(it, request(12, num_choices=2))
    behind = added(it, request(3, text=1))
    run_step(it)
    assert list(it.running) == [first, behind]
    run_step(it)
    run_step(it)
    assert list(it.running) == [first, behind, second]


def test_choices_go_before_later_sequences_of_their_flow() -> None:
    it = scheduler(max_sequences=1, max_tokens=64)
    choices = added_choices(it, request(8, 1, num_choices=3))
    later = added(it, request(8, 1, text=1))
    assert [chunks[0].sequence for chunks in run(it)] == [*choices, later]


@pytest.mark.parametrize("num_steps", [0, 1])
def test_when_the_choice_that_computes_the_prompt_is_dropped_another_computes_it(num_steps: int) -> None:
    it = scheduler(max_tokens=8)
    choices = added_choices(it, request(18, 2, num_choices=3))
    for _ in range(num_steps):
        run_step(it)
    it.finish(choices[0])
    it.check_integrity()
    assert spans(run_step(it)) == [(choices[1], 8 * num_steps, 8 * num_steps + 8)]
    run(it)
    assert [len(s.output_ids) for s in choices] == [0, 2, 2]


def test_the_choice_that_takes_over_the_prompt_goes_before_later_sequences() -> None:
    it = scheduler(max_sequences=1)
    first, second = added_choices(it, request(18, 2, num_choices=2))
    later = added(it, request(8, 1, text=1))
    run_step(it)
    it.finish(first)
    run_step(it)
    assert list(it.running) == [second]
    assert list(it.waiting) == [later]


def test_a_choice_that_waits_for_the_prompt_can_be_dropped() -> None:
    it = scheduler(max_tokens=8)
    choices = added_choices(it, request(18, 2, num_choices=3))
    run_step(it)
    it.abort(choices[1])
    assert it.drop_aborted() == [choices[1]]
    run(it)
    assert [len(s.output_ids) for s in choices] == [2, 0, 2]


def test_all_choices_are_dropped_at_once() -> None:
    it = scheduler(max_tokens=8)
    choices = added_choices(it, request(18, 2, num_choices=3))
    run_step(it)
    for sequence in choices:
        it.abort(sequence)
    assert set(it.drop_aborted()) == set(choices)
    assert not it.has_work
    it.check_integrity()


def test_a_prompt_to_be_scored_is_computed_whole_by_the_first_choice_alone() -> None:
    it = scheduler(max_tokens=64)
    added(it, request(18, 1))
    run(it)
    first, second = added_choices(it, request(18, 2, num_choices=2, is_scored=True))
    assert spans(run_step(it)) == [(first, 0, 18)]
    assert spans(run_step(it)) == [(first, 18, 19), (second, 16, 18)]
