"""What a step is said to cost, and how much of a prompt it has room for."""

from math import inf

import pytest

from server.engine.scheduling.step_cost import LEAST, MAX_SHORT_STEPS, MULTIPLE, Curve, Room, StepCost

MEASURED = StepCost(
    prompt=Curve((1, 16, 64), (9.0, 12.0, 36.0)), decoding=Curve((1, 16, 64), (9.0, 15.0, 45.0)), per_key=0.001, per_pair=0.0002
)
"""Milliseconds of a model on a CPU: up to 16 tokens cost little, those after them half a millisecond each."""


def room(max_tokens: int = 512, max_stall: float = 1.8, short_step_s: float = 0.0, num_decoding: int = 8) -> Room:
    """Returns the room beside sequences that decode at position 150."""
    return Room(MEASURED, max_tokens=max_tokens, max_stall=max_stall, short_step_s=short_step_s, positions=[150] * num_decoding)


@pytest.mark.parametrize(("count", "seconds"), [(1, 9), (6, 10), (16, 12), (40, 24), (64, 36), (128, 68)])
def test_a_curve_is_linear_between_its_points_and_goes_on_after_the_last(count: int, seconds: float) -> None:
    assert Curve((1, 16, 64), (9.0, 12.0, 36.0))(count) == pytest.approx(seconds)


def test_a_curve_of_one_point_is_flat() -> None:
    assert Curve((1,), (9.0,))(50) == 9.0


@pytest.mark.parametrize(("counts", "seconds"), [((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 2.0)), ((1, 2), (2.0, 1.0))])
def test_a_curve_that_goes_down_is_our_own_fault(counts: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(AssertionError):
        Curve(counts, seconds)


def test_a_usual_step_costs_its_sequences_and_the_keys_that_each_reads() -> None:
    assert MEASURED.usual([100, 300]) == pytest.approx(9.4 + 0.0012 * 400)


def test_a_chunk_adds_its_tokens_one_reading_of_the_keys_and_a_pair_for_each_token_and_key() -> None:
    # From 8 tokens to 16; the keys are those before the chunk, and half of its own.
    assert MEASURED.added(8, 2000, 8) == pytest.approx(8 / 15 * 3.0 + 0.001 * 2004 + 0.0002 * 8 * 2004)


def test_the_first_chunk_of_a_step_brings_what_any_step_costs() -> None:
    assert MEASURED.added(0, 0, 16) == pytest.approx(12.0 + 0.001 * 8 + 0.0002 * 16 * 8)


@pytest.mark.parametrize("max_stall", [1.3, 1.8, 2.0])
@pytest.mark.parametrize("start", [0, 1000, 3900])
@pytest.mark.parametrize("num_decoding", [1, 8, 13, 32])
def test_a_chunk_is_the_longest_whose_step_takes_no_longer_than_it_may(num_decoding: int, start: int, max_stall: float) -> None:
    positions = [150] * num_decoding
    count = room(max_stall=max_stall, num_decoding=num_decoding).take(start, 4000)
    usual = MEASURED.usual(positions)
    assert count >= LEAST
    assert (num_decoding + count) % MULTIPLE == 0
    assert usual + MEASURED.added(num_decoding, start, count + MULTIPLE) > max_stall * usual
    assert count < LEAST + MULTIPLE or usual + MEASURED.added(num_decoding, start, count) <= max_stall * usual


def test_the_end_of_a_prompt_is_taken_as_it_is() -> None:
    assert room().take(0, 11) == 11
    assert room(max_stall=1.0).take(0, 3) == 3


def test_several_prompts_share_the_room_and_none_but_the_first_is_given_what_there_is_not() -> None:
    alone = room().take(0, 500)
    shared = room()
    assert shared.take(0, 8) == 8
    second = shared.take(0, 500)
    assert LEAST <= second < alone
    assert 8 + second <= alone + MULTIPLE
    assert shared.take(0, 500) == 0


def test_a_step_without_decoding_has_all_its_tokens_to_give() -> None:
    whole = room(64, 1.0, num_decoding=0)
    assert [whole.take(0, 40), whole.take(0, 40), whole.take(0, 40)] == [40, 24, 0]


@pytest.mark.parametrize("max_stall", [1.0, inf])
def test_there_is_never_room_for_more_tokens_than_a_step_may_have(max_stall: float) -> None:
    assert room(10, max_stall).take(0, 100) == 2


def seconds_of(count: int) -> float:
    return MEASURED.usual([150] * 8) + MEASURED.added(8, 0, count)


def test_short_prompts_together_fill_a_step_of_the_time_that_it_may_take_for_them() -> None:
    several = room(short_step_s=40.0)
    counts = [several.take(0, 30), several.take(0, 30), several.take(0, 30)]
    assert counts[0] == 30
    assert LEAST <= counts[1] < 30
    assert counts[2] == 0
    assert seconds_of(sum(counts)) <= 40.0 < seconds_of(sum(counts) + MULTIPLE)


def test_long_prompts_have_no_part_in_that_and_short_ones_have_what_these_leave() -> None:
    count = room().take(0, 4000)
    both = room(short_step_s=40.0)
    assert both.take(0, 4000) == count
    beside = both.take(0, 24)
    assert LEAST <= beside <= 24
    assert both.take(0, 4000) == 0
    assert seconds_of(count + beside) <= 40.0


def test_the_end_of_a_long_prompt_is_not_short() -> None:
    longest = next(count for count in range(1, 4000) if MEASURED.added(0, 0, count + 1) > 40.0 * MAX_SHORT_STEPS)
    limited = room().take(longest - 30, 4000)
    assert room(short_step_s=40.0).take(longest - 30, 30) == 30
    assert room(short_step_s=40.0).take(longest - 30, 31) == limited < 30
    assert room(short_step_s=40.0).take(longest - 30, 31, first=2) > limited, "what was found in the cache is not computed"


@pytest.mark.parametrize("short_step_s", [0.0, 1.0])
def test_a_step_that_is_longer_anyway_has_the_greatest_stall_for_all(short_step_s: float) -> None:
    assert room(short_step_s=short_step_s).take(0, 40) == room().take(0, 40) < 40
