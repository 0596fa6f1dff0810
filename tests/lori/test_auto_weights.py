"""Automatic weights: the shares of named adapters, and the choice among many."""

from collections.abc import Sequence

import numpy as np
import pytest

from lori.auto_weights import GRID, NUM_NEAREST, AutoChoice, Choice, PromptIndex, Shares, shares
from lori.prompt_statistics import NUM_FEATURES, Background, ProbedPrompt, PromptStatistics, joined
from tests.lori.features import SEEDS, draw, make_adapters, make_background


@pytest.fixture(scope="module")
def background() -> Background:
    return make_background()


@pytest.fixture(scope="module")
def adapters(background: Background) -> list[PromptStatistics]:
    return make_adapters(background)


def test_a_prompt_like_an_adapter_s_goes_to_it(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    for index, seed in enumerate((11, 12, 13)):
        [z] = draw(seed, 3.0, count=1)
        expected = tuple(float(i == index) for i in range(3))
        assert shares(z, background, adapters).weights == expected


def test_another_prompt_goes_to_the_base(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    for z in (draw(1, count=1)[0], np.zeros(NUM_FEATURES), draw(99, 50.0, count=1)[0]):
        assert shares(z, background, adapters).base == 1.0


def test_shares_lie_on_the_grid_and_their_sum_is_1(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    starts = [adapter.gaussians.means[0].astype(np.float64) for adapter in adapters]
    middle = sum(starts, np.zeros(NUM_FEATURES)) / 3
    z = np.linalg.solve(background.whitening.T.astype(np.float64), middle) + background.mean
    result = shares(z, background, adapters)
    parts = [*result.weights, result.base]
    assert sum(parts) == 1
    assert all((part * GRID).is_integer() for part in parts)


def test_the_order_of_adapters_does_not_matter(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    [z] = draw(12, 2.0, count=1)
    forward, backward = shares(z, background, adapters), shares(z, background, adapters[::-1])
    assert forward.weights == backward.weights[::-1]
    assert forward.base == backward.base


@pytest.mark.parametrize(("count", "weight"), [(1, 1.0), (2, 8 / GRID), (3, 5 / GRID), (5, 3 / GRID), (17, 0.0)])
def test_equal_adapters_get_equal_weights(
    background: Background, adapters: Sequence[PromptStatistics], count: int, weight: float
) -> None:
    [z] = draw(11, 3.0, count=1)
    for order in ([*[adapters[0]] * count, adapters[1]], [adapters[1], *[adapters[0]] * count]):
        result = shares(z, background, order)
        assert sorted(result.weights) == sorted([0.0, *[weight] * count])
        assert result.base == 1 - count * weight


def test_a_form_given_twice_changes_nothing(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    [z] = draw(11, 2.0, count=1)
    twice = PromptStatistics("a" * 64, background.digest, joined([adapters[0].gaussians] * 2))
    assert shares(z, background, [twice]) == shares(z, background, [adapters[0]])


def test_several_forms_count_as_one_adapter(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    both = PromptStatistics("a" * 64, background.digest, joined([adapters[0].gaussians, adapters[1].gaussians]))
    for seed in (11, 12):
        [z] = draw(seed, 3.0, count=1)
        assert shares(z, background, [both, adapters[2]]).weights == (1.0, 0.0)


def test_prior_odds_are_counted(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    [z] = draw(11, 3.0, count=1)
    assert shares(z, background, adapters).weights[0] == 1.0
    assert shares(z, background, adapters, log_odds=-1e6) == Shares((0.0,) * 3, 1.0)


@pytest.fixture(scope="module")
def many(background: Background) -> list[PromptStatistics]:
    return make_adapters(background, range(100, 100 + 3 * NUM_NEAREST))


def test_a_prompt_chooses_its_adapter_among_many(background: Background, many: Sequence[PromptStatistics]) -> None:
    index = PromptIndex(background, many)
    for place in range(0, len(many), 5):
        for z in draw(100 + place, 3.0, count=3):
            assert index.choose(z, 2, 0.5) == Choice((place,), Shares((1.0,), 0.0))
    for z in (draw(1, count=1)[0], draw(99, 50.0, count=1)[0]):
        assert index.choose(z, 2, 0.5) == Choice((), Shares((), 1.0))


def test_the_choice_among_many_is_that_of_a_comparison_with_all(background: Background, many: Sequence[PromptStatistics]) -> None:
    index = PromptIndex(background, many)
    for seed, centre in ((100, 1.5), (103, 2.0), (150, 2.5), (170, 1.0)):
        for z in draw(seed, centre, count=4):
            expected = shares(z, background, many, log_odds=-np.log(len(many)))
            chosen = index.choose(z, len(many), 0.0)
            assert dict(zip(chosen.adapters, chosen.shares.weights, strict=True)) == {
                i: weight for i, weight in enumerate(expected.weights) if weight
            }
            assert chosen.shares.base == pytest.approx(expected.base)


@pytest.mark.parametrize("num_adapters", [len(SEEDS), 3 * NUM_NEAREST])
def test_only_allowed_adapters_are_chosen(background: Background, many: Sequence[PromptStatistics], num_adapters: int) -> None:
    adapters = many[:num_adapters]
    index, [z] = PromptIndex(background, adapters), draw(101, 3.0, count=1)
    allowed = np.ones(num_adapters, dtype=bool)
    assert index.choose(z, 2, 0.5, allowed).adapters == (1,)
    allowed[1] = False
    assert 1 not in index.choose(z, num_adapters, 0.0, allowed).adapters
    assert index.choose(z, 2, 0.5, np.zeros(num_adapters, dtype=bool)) == Choice((), Shares((), 1.0))


def test_equal_adapters_share_up_to_the_maximum(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    index, [z] = PromptIndex(background, [adapters[0]] * 4), draw(11, 3.0, count=1)
    assert index.choose(z, 4, 0.5) == Choice((0, 1, 2, 3), Shares((0.25,) * 4, 0.0))
    assert index.choose(z, 3, 0.5) == Choice((0, 1, 2), Shares((0.25,) * 3, 0.25))
    assert index.choose(z, 1, 0.25) == Choice((0,), Shares((0.25,), 0.75))
    assert index.choose(z, 1, 0.26) == Choice((), Shares((), 1.0))


def test_without_adapters_the_base_is_chosen(background: Background) -> None:
    decision = AutoChoice(ProbedPrompt((1,), 0, 1), PromptIndex(background, []), 3, 0.5)
    assert decision.decide(np.zeros(NUM_FEATURES), background) == Choice((), Shares((), 1.0))
