"""Automatic weights: the shares of named adapters, and the choice among many."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lori.auto_weights import (
    GRID,
    MAX_EXACT,
    TEMPERATURE,
    Selection,
    SelectionIndex,
    SelectionQuery,
    Shares,
    mean_weights,
    shares,
)
from lori.flat_index import BoolArray
from lori.gaussians import MAX_MAGNITUDE, Array, as_float32, joined, log_likelihoods, logsumexp
from lori.prompt_statistics import BACKGROUNDS, MAX_GAUSSIANS, NUM_FEATURES, Background, ProbedPrompt, PromptStatistics
from lori.store.entry import Entry
from tests.lori.features import SEEDS, copies, draw, draw_prompt, make_adapters


def test_a_prompt_like_an_adapter_s_goes_to_it(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    for index, seed in enumerate(SEEDS):
        [z] = draw(seed, 3.0, count=1)
        expected = tuple(float(i == index) for i in range(3))
        assert shares(z, background, adapters).weights == expected


def test_another_prompt_goes_to_the_base(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    for z in (draw(1, count=1)[0], np.zeros(NUM_FEATURES), draw(99, 50.0, count=1)[0]):
        assert shares(z, background, adapters).base == 1.0


def test_shares_lie_on_the_grid_and_their_sum_is_1(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    [z] = draw(11, 3.0, count=1)
    uneven = [
        shares(z, replace(background, log_odds=odds), [adapters[0], adapters[1]]) for odds in np.linspace(-1000, 1000, 2001)
    ]
    assert len({result.base for result in uneven}) > 2, "no share is between 0 and 1"
    for result in uneven:
        parts = [*result.weights, result.base]
        assert sum(parts) == 1
        assert all((part * GRID).is_integer() for part in parts)


def test_like_adapters_share_by_their_tempered_likelihoods(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    pair = copies(adapters[:1], 2, spread=0.3, random=np.random.default_rng(0))
    firsts = []
    for z in draw(11, 3.0, count=20):
        result = shares(z, background, pair)
        first, second = (float(log_likelihoods(one.gaussians.components, background.whiten(z))[0]) for one in pair)
        assert result.base == 0
        assert result.weights[0] == pytest.approx(1 / (1 + np.exp((second - first) / TEMPERATURE)), abs=0.5 / GRID)
        firsts.append(result.weights[0])
    assert sum(0 < first < 1 for first in firsts) >= 18, "at lower temperatures one has all of the weight more often"


def test_a_selection_of_like_adapters_shares_as_if_they_were_named(
    background: Background, adapters: Sequence[PromptStatistics]
) -> None:
    pair = copies(adapters[:1], 2, spread=0.1, random=np.random.default_rng(0))
    index = SelectionIndex(background, pair)
    for z in draw(11, 3.0, count=20):
        named, selection = shares(z, shared_prior(background, 2), pair), index.select(z, 2, allow(index))
        weights = dict(zip(selection.adapters, selection.shares.weights, strict=True))
        assert (weights.get(0, 0.0), weights.get(1, 0.0)) == named.weights
        assert [*weights.values()] == sorted(weights.values(), reverse=True)


def test_the_order_of_adapters_does_not_matter(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    like = copies(adapters[:1], 3, spread=0.1, random=np.random.default_rng(0))
    results = [(shares(z, background, like), shares(z, background, like[::-1])) for z in draw(11, 3.0, count=20)]
    assert any(len({*forward.weights}) == 3 for forward, _ in results)
    for forward, backward in results:
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


def test_mean_weights_are_those_of_an_adapter_s_prompts(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    for index, adapter in enumerate(adapters):
        assert mean_weights(background, adapters, adapter).tolist() == [float(i == index) for i in range(3)]
    assert mean_weights(background, adapters[:2], adapters[2]).tolist() == [0.0, 0.0]
    equal = mean_weights(background, [adapters[0], adapters[0], adapters[1]], adapters[0])
    assert equal.tolist() == [0.5, 0.5, 0.0]


def test_mean_weights_are_over_every_form(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    both = PromptStatistics("a" * 64, background.digest, joined([adapters[0].gaussians, adapters[1].gaussians]))
    assert mean_weights(background, adapters[:1], both).tolist() == [0.5]


def test_prior_odds_are_counted(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    [z] = draw(11, 3.0, count=1)
    assert shares(z, background, adapters).weights[0] == 1.0
    assert shares(z, replace(background, log_odds=-1e6), adapters) == Shares((0.0,) * 3, 1.0)


def shared_prior(background: Background, num_adapters: int) -> Background:
    """Return `background` with the prior of one of `num_adapters` that have the background's together."""
    return replace(background, log_odds=background.log_odds - np.log(num_adapters))


@pytest.mark.parametrize("expected", [-7, -3])
def test_the_background_has_the_prior_odds_of_an_adapter_and_of_all_that_may_be_selected(
    background: Background, adapters: Sequence[PromptStatistics], expected: float
) -> None:
    background = replace(background, log_odds=expected)
    [start], [stop] = draw(1, count=1), draw(11, 3.0, count=1)
    path = start + np.linspace(0, 1, 100_000)[:, None] * (stop - start)

    def crossing(share: Callable[[Array], float]) -> Array:
        return path[bisect_left(range(len(path)), 0.5, key=lambda place: share(path[place]))]

    def log_ratio(z: Array) -> float:
        whitened = background.whiten(z)
        [own] = log_likelihoods(adapters[0].gaussians.components, whitened)
        return float(own) - background.log_likelihood(
            whitened, log_likelihoods(background.gaussians.components, whitened).tolist()
        )

    # On the grid, one half is reached from 15/32 on, and by eight adapters together from 4/9 on.
    log_odds = log_ratio(crossing(lambda z: shares(z, background, adapters[:1]).weights[0])) - np.log(15 / 17)
    assert log_odds == pytest.approx(-expected, abs=0.05)
    index = SelectionIndex(background, [adapters[0]] * 8)
    log_odds = log_ratio(crossing(lambda z: 1 - index.select(z, 8, allow(index)).shares.base)) - np.log(4 / 5)
    assert log_odds == pytest.approx(-expected, abs=0.05)
    one = log_ratio(crossing(lambda z: 1 - index.select(z, 1, allow(index)).shares.base)) - np.log(15 / 17)
    assert one == pytest.approx(-expected, abs=0.05), "the odds are those of all eight, not of the one selected"


@pytest.fixture(scope="module")
def many(background: Background) -> list[PromptStatistics]:
    return make_adapters(background, range(100, 101 + MAX_EXACT))


def allow(index: SelectionIndex) -> BoolArray:
    return np.ones(len(index), dtype=bool)


@pytest.mark.usefixtures("compiled_and_numpy")
def test_a_prompt_gets_its_adapter_among_many(background: Background, many: Sequence[PromptStatistics]) -> None:
    index = SelectionIndex(background, many)
    for place in range(0, len(many), 5):
        for z in draw(100 + place, 3.0, count=3):
            assert index.select(z, 2, allow(index)) == Selection((place,), Shares((1.0,), 0.0))
    for z in (draw(1, count=1)[0], draw(99, 50.0, count=1)[0]):
        assert index.select(z, 2, allow(index)) == Selection((), Shares((), 1.0))


def test_the_selection_among_many_is_that_of_a_comparison_with_all(
    background: Background, many: Sequence[PromptStatistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lori.auto_weights.NUM_AVERAGED", 10)
    # Some are there twice, so that they share the weight.
    adapters = [*many, *many[3::7]]
    index = SelectionIndex(background, adapters)
    selections = set()
    for place in (0, 3, 10, 11, 17):
        for z in draw(100 + place, 3.0, count=3):
            expected = shares(z, shared_prior(background, len(adapters)), adapters)
            selection = index.select(z, len(adapters), allow(index))
            selections.add(selection.shares.weights)
            weights = {i: weight for i, weight in enumerate(expected.weights) if weight}
            assert dict(zip(selection.adapters, selection.shares.weights, strict=True)) == weights
            assert selection.shares.base == pytest.approx(expected.base)
    assert selections == {(1.0,), (0.5, 0.5)}


@pytest.mark.usefixtures("compiled_and_numpy")
@pytest.mark.parametrize("num_forms", [1, 17])
def test_the_most_likely_of_thousands_of_forms_is_selected(
    background: Background, adapters: Sequence[PromptStatistics], num_forms: int
) -> None:
    original = replace(adapters[0], gaussians=joined([adapters[0].gaussians] * num_forms))
    like = copies([original], 1500 // num_forms, spread=0.3, random=np.random.default_rng(0))
    index = SelectionIndex(background, like)
    some, few = allow(index), allow(index)
    some[:: len(like) // 5], few[MAX_EXACT // num_forms :] = False, False  # most or few are allowed
    num_found = 0
    for place in np.linspace(0, len(like) - 1, 10).astype(int):
        z = draw_prompt(like[place].gaussians, background, seed=int(place))
        for allowed in (allow(index), some, few):
            places = np.flatnonzero(allowed)
            whitened = background.whiten(z)
            exact = [logsumexp(log_likelihoods(like[i].gaussians.components, whitened).tolist()) for i in places]
            selection = index.select(z, 1, allowed)
            assert allowed[[*selection.adapters]].all()
            num_found += selection.adapters == (places[np.argmax(exact)],)
    assert num_found >= 28  # of 30


@pytest.mark.usefixtures("compiled_and_numpy")
@pytest.mark.parametrize("magnitude", [1e3, MAX_MAGNITUDE])
@pytest.mark.parametrize(("num_adapters", "num_forms"), [(1, 1), (3, MAX_GAUSSIANS), (200, 1)])
def test_extreme_statistics_of_some_adapters_do_not_change_the_selections_of_others(
    background: Background, many: Sequence[PromptStatistics], num_adapters: int, num_forms: int, magnitude: float
) -> None:
    """Regressions: all directions were rounded by their greatest value, and the origin was the median of all forms."""
    far = replace(many[0].gaussians, means=np.full_like(many[0].gaussians.means, magnitude))
    content = replace(many[0], gaussians=joined([far] * num_forms)).to_bytes()
    index = SelectionIndex(background, [*many, *[PromptStatistics.from_bytes("extreme", content)] * num_adapters])
    for place in range(0, len(many), 9):
        [z] = draw(100 + place, 3.0, count=1)
        assert index.select(z, 2, allow(index)) == Selection((place,), Shares((1.0,), 0.0))


@pytest.fixture(scope="module")
def likes_of_demos() -> tuple[Background, list[PromptStatistics]]:
    """Return the shipped background, and 600 adapters that are hard to tell apart: copies of the demo adapters' statistics."""
    [file] = BACKGROUNDS.glob("*.safetensors")
    folders = sorted(folder for folder in Path(__file__).parents[2].glob("server/adapters/*") if folder.is_dir())
    originals = [own for folder in folders if (own := Entry(folder.name, folder).prompt_statistics())]
    likes = copies(originals, 600, spread=0.3, random=np.random.default_rng(0))
    return Background.from_bytes(str(file), file.read_bytes()), likes


@pytest.mark.parametrize(
    ("mean", "spread", "variance"), [(0.0, 1.0, MAX_MAGNITUDE), (MAX_MAGNITUDE, 0.0, 1.0), (0.0, 3.0, 1.0), (0.0, 30.0, 1e-9)]
)
def test_the_forms_of_one_adapter_do_not_blur_the_others(
    likes_of_demos: tuple[Background, list[PromptStatistics]], mean: float, spread: float, variance: float
) -> None:
    """Regression: each form counted in the directions by which adapters are found, with its own scale and distance."""
    background, likes = likes_of_demos
    forms = joined([likes[0].gaussians] * MAX_GAUSSIANS).first(MAX_GAUSSIANS)
    means = as_float32(mean + spread * np.random.default_rng(5).standard_normal(forms.means.shape))
    extreme = replace(forms, means=means, variances=np.full_like(forms.variances, variance))
    plain = SelectionIndex(background, likes)
    index = SelectionIndex(background, [*likes, replace(likes[0], gaussians=extreme)])
    num_own = num_expected = 0
    for number, place in enumerate(np.random.default_rng(1).integers(len(likes), size=300).tolist()):
        z = draw_prompt(likes[place].gaussians, background, seed=number)
        num_expected += place in plain.select(z, 3, allow(plain)).adapters
        num_own += place in index.select(z, 3, allow(index)).adapters
    assert num_own >= num_expected - 1


@pytest.mark.usefixtures("compiled_and_numpy")
def test_an_adapter_of_many_equal_forms_does_not_keep_out_its_like(
    background: Background, many: Sequence[PromptStatistics]
) -> None:
    """Regression: its forms were all of those that were compared exactly."""
    crowd = replace(many[0], gaussians=joined([many[0].gaussians] * MAX_GAUSSIANS))
    index = SelectionIndex(background, [crowd, *many])
    for z in draw(100, 3.0, count=3):
        assert index.select(z, 2, allow(index)) == Selection((0, 1), Shares((0.5, 0.5), 0.0))


@pytest.mark.parametrize(("num_adapters", "num_forms"), [(2, 64), (5, 7), (9, 14), (4, 64), (4, 33)])
def test_equal_adapters_of_many_equal_forms_share(
    background: Background, adapters: Sequence[PromptStatistics], num_adapters: int, num_forms: int
) -> None:
    equal = PromptStatistics("a" * 64, background.digest, joined([adapters[0].gaussians] * num_forms))
    index, [z] = SelectionIndex(background, [equal] * num_adapters), draw(11, 3.0, count=1)
    weight = GRID // num_adapters / GRID
    assert index.select(z, num_adapters, allow(index)).shares.weights == (weight,) * num_adapters


def test_a_form_that_is_not_compared_counts_among_its_adapter_s(background: Background, many: Sequence[PromptStatistics]) -> None:
    def with_far_form(adapter: PromptStatistics) -> PromptStatistics:
        far = replace(adapter.gaussians, means=adapter.gaussians.means + 50)
        return PromptStatistics("a" * 64, background.digest, joined([adapter.gaussians, far]))

    adapters = [with_far_form(adapter) for adapter in many]
    index = SelectionIndex(background, adapters)
    [start], [stop] = draw(1, count=1), draw(100, 3.0, count=1)
    weights = set()
    for z in start + np.linspace(0.3, 0.7, 400)[:, None] * (stop - start):
        expected = shares(z, shared_prior(background, len(adapters)), adapters)
        selection = index.select(z, 1, allow(index))
        assert selection.shares.weights == tuple(filter(None, expected.weights))
        weights.add(selection.shares.base)
    assert len(weights) > 4


@pytest.mark.parametrize("num_adapters", [len(SEEDS), MAX_EXACT + 1])
def test_only_allowed_adapters_are_selected(background: Background, many: Sequence[PromptStatistics], num_adapters: int) -> None:
    index, [z] = SelectionIndex(background, many[:num_adapters]), draw(101, 3.0, count=1)
    allowed = allow(index)
    assert index.select(z, 2, allowed).adapters == (1,)
    allowed[1] = False
    assert 1 not in index.select(z, num_adapters, allowed).adapters
    assert index.select(z, 2, ~allow(index)) == Selection((), Shares((), 1.0))


def test_equal_adapters_share_up_to_the_maximum(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    index, [z] = SelectionIndex(background, [adapters[0]] * 4), draw(11, 3.0, count=1)
    assert index.select(z, 4, allow(index)) == Selection((0, 1, 2, 3), Shares((0.25,) * 4, 0.0))
    assert index.select(z, 3, allow(index)) == Selection((0, 1, 2), Shares((0.3125,) * 3, 0.0625))  # thirds, on the grid
    assert index.select(z, 2, allow(index)) == Selection((0, 1), Shares((0.5, 0.5), 0.0))


def test_adapters_that_are_kept_divide_what_the_others_had() -> None:
    result = Shares((0.5, 0.25, 0.125), 0.125)
    assert result.kept([0, 1, 2]) == result
    assert result.kept([0, 2]) == Shares((0.6875, 0.1875), 0.125)
    assert result.kept([2]) == Shares((0.875,), 0.125)


def test_without_adapters_none_is_selected(background: Background) -> None:
    index = SelectionIndex(background, [])
    query = SelectionQuery(ProbedPrompt((1,), 0, 1), index, 3, allow(index))
    assert query.evaluate(np.zeros(NUM_FEATURES)) == Selection((), Shares((), 1.0))
