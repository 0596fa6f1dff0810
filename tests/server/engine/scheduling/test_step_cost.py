"""Predicted costs of steps."""

import pytest

from server.engine.scheduling.step_budget import Curve
from tests.server.plans import MEASURED


@pytest.mark.parametrize(("count", "seconds"), [(1, 9), (6, 10), (16, 12), (40, 24), (64, 36), (128, 68)])
def test_a_curve_is_linear_between_its_points_and_goes_on_after_the_last(count: int, seconds: float) -> None:
    assert Curve((1, 16, 64), (9.0, 12.0, 36.0))(count) == pytest.approx(seconds)


def test_a_curve_of_one_point_is_flat() -> None:
    assert Curve((1,), (9.0,))(50) == 9.0


@pytest.mark.parametrize(("counts", "seconds"), [((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 2.0)), ((1, 2), (2.0, 1.0))])
def test_a_malformed_curve_is_an_assertion_error(counts: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(AssertionError):
        Curve(counts, seconds)


def test_a_decoding_step_costs_its_sequences_and_the_keys_that_each_reads() -> None:
    assert MEASURED.decode_seconds([100, 300]) == pytest.approx(9.4 + 0.0012 * 400)


def test_a_chunk_adds_its_tokens_one_reading_of_the_keys_and_a_pair_for_each_token_and_key() -> None:
    # From 8 tokens to 16; the keys are those before the chunk, and half of its own.
    assert MEASURED.chunk_seconds(8, 2000, 8) == pytest.approx(8 / 15 * 3.0 + 0.001 * 2004 + 0.0002 * 8 * 2004)


def test_the_first_chunk_of_a_step_includes_the_cost_of_any_step() -> None:
    assert MEASURED.chunk_seconds(0, 0, 16) == pytest.approx(12.0 + 0.001 * 8 + 0.0002 * 16 * 8)
