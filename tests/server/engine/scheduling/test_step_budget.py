"""Step budget: the room of a step for prompts."""

from math import inf

import pytest

from server.engine.scheduling.step_budget import (
    CHUNK_MULTIPLE,
    MAX_SHORT_STEPS,
    MIN_CHUNK_TOKENS,
    Curve,
    StepBudget,
    StepCost,
)
from tests.server.plans import MEASURED, step_limits


def room(
    max_tokens: int = 512, max_stall: float = 1.8, short_step_s: float = 0.0, num_decoding: int = 8, num_short: int = 0
) -> StepBudget:
    """Return the room beside sequences that decode at position 150."""
    limits = step_limits(max_tokens - 1, max_tokens, max_stall, short_step_s, MEASURED)
    return StepBudget(limits, [150] * num_decoding, num_short)


def take(budget: StepBudget, start: int, num_tokens: int, *, first: int = 0, may_exceed: bool = True) -> int:
    return budget.take(start, start + num_tokens, prefill_start=first, may_exceed=may_exceed)


@pytest.mark.parametrize("max_stall", [1.3, 1.8, 2.0])
@pytest.mark.parametrize("start", [0, 1000, 3900])
@pytest.mark.parametrize("num_decoding", [1, 8, 13, 32])
def test_a_chunk_is_the_longest_whose_step_stays_within_the_greatest_stall(
    num_decoding: int, start: int, max_stall: float
) -> None:
    count = take(room(max_stall=max_stall, num_decoding=num_decoding), start, 4000)
    usual = MEASURED.decode_seconds([150] * num_decoding)
    assert count >= MIN_CHUNK_TOKENS
    assert (num_decoding + count) % CHUNK_MULTIPLE == 0
    assert usual + MEASURED.chunk_seconds(num_decoding, start, count + CHUNK_MULTIPLE) > max_stall * usual
    assert (
        count < MIN_CHUNK_TOKENS + CHUNK_MULTIPLE
        or usual + MEASURED.chunk_seconds(num_decoding, start, count) <= max_stall * usual
    )


@pytest.mark.parametrize(
    ("prompt", "decoding", "expected"),
    [(0.01, 0.005, 0.035), (0.08, 0.025, 0.08), (3.0, 0.5, 0.1)],
    ids=["fast", "slow", "slow and large"],
)
def test_steps_with_short_prompts_are_longer_on_a_slow_cpu(prompt: float, decoding: float, expected: float) -> None:
    cost = StepCost(prompt=Curve((1, 64), (decoding, prompt)), decoding=Curve((1,), (decoding,)), per_key=0.0, per_pair=0.0)
    assert cost.short_step_seconds() == pytest.approx(expected)


def test_the_last_chunk_of_a_prompt_is_not_rounded() -> None:
    assert take(room(), 0, 11) == 11
    assert take(room(max_stall=1.0), 0, 3) == 3


def test_several_prompts_share_the_room_and_only_the_first_may_exceed_it() -> None:
    alone = take(room(), 0, 500)
    shared = room()
    assert take(shared, 0, 8) == 8
    second = take(shared, 0, 500)
    assert MIN_CHUNK_TOKENS <= second < alone
    assert 8 + second <= alone + CHUNK_MULTIPLE
    assert take(shared, 0, 500) == 0


def test_a_step_without_decoding_gives_all_its_tokens_to_prompts() -> None:
    whole = room(64, 1.0, num_decoding=0)
    assert [take(whole, 0, 40), take(whole, 0, 40), take(whole, 0, 40)] == [40, 24, 0]


@pytest.mark.parametrize("max_stall", [1.0, inf])
def test_there_is_never_room_for_more_tokens_than_a_step_may_have(max_stall: float) -> None:
    assert take(room(10, max_stall), 0, 100) == 2


def seconds_of(count: int) -> float:
    return MEASURED.decode_seconds([150] * 8) + MEASURED.chunk_seconds(8, 0, count)


def test_short_prompts_together_fill_a_step_up_to_the_time_for_short_prompts() -> None:
    several = room(short_step_s=40.0)
    counts = [take(several, 0, 30), take(several, 0, 30), take(several, 0, 30)]
    assert counts[0] == 30
    assert MIN_CHUNK_TOKENS <= counts[1] < 30
    assert counts[2] == 0
    assert seconds_of(sum(counts)) <= 40.0 < seconds_of(sum(counts) + CHUNK_MULTIPLE)


def test_long_prompts_get_none_of_the_time_for_short_ones_and_short_ones_get_the_rest() -> None:
    count = take(room(), 0, 4000)
    both = room(short_step_s=40.0)
    assert take(both, 0, 4000) == count
    beside = take(both, 0, 24)
    assert MIN_CHUNK_TOKENS <= beside <= 24
    assert take(both, 0, 4000) == 0
    assert seconds_of(count + beside) <= 40.0


def test_short_prompts_that_may_not_exceed_get_none_of_the_time_for_short_ones() -> None:
    assert take(room(short_step_s=40.0), 0, 40, may_exceed=False) == take(room(), 0, 40) < take(room(short_step_s=40.0), 0, 40)


def test_the_end_of_a_long_prompt_is_not_short() -> None:
    longest = next(count for count in range(1, 4000) if MEASURED.chunk_seconds(0, 0, count + 1) > 40.0 * MAX_SHORT_STEPS)
    limited = take(room(), longest - 30, 4000)
    assert take(room(short_step_s=40.0), longest - 30, 30) == 30
    assert take(room(short_step_s=40.0), longest - 30, 31) == limited < 30
    assert take(room(short_step_s=40.0), longest - 30, 31, first=2) > limited, (
        "tokens that were found in the cache are not computed"
    )


@pytest.mark.parametrize(("num_short", "factor"), [(0, 1), (8, 2), (24, 4), (80, 4)])
def test_a_step_with_many_short_prompts_is_longer(num_short: int, factor: float) -> None:
    several = room(short_step_s=40.0, num_short=num_short)
    equivalent = room(short_step_s=40.0 * factor)
    counts = [take(several, 0, 40) for _ in range(20)]
    assert counts == [take(equivalent, 0, 40) for _ in range(20)]
    assert 0 < sum(counts) < 512 - 8


@pytest.mark.parametrize("short_step_s", [12.0, 20.0])
def test_short_prompts_have_at_least_the_time_of_all_prompts(short_step_s: float) -> None:
    assert MEASURED.chunk_seconds(0, 0, 40) < MAX_SHORT_STEPS * short_step_s
    assert take(room(short_step_s=short_step_s), 0, 40) == take(room(), 0, 40) < 40


def test_without_decoding_a_long_prompt_keeps_to_the_time_for_the_short_one_beside_it() -> None:
    one = room(num_decoding=0, short_step_s=40.0)
    assert take(one, 0, 30) == 30
    beside = take(one, 0, 4000)
    assert MEASURED.chunk_seconds(0, 0, 30 + beside) <= 40.0
    assert beside >= MIN_CHUNK_TOKENS
    several = room(num_decoding=0, short_step_s=40.0)
    assert [take(several, 0, 60) for _ in range(5)] == [60] * 5
