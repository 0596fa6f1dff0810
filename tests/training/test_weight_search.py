"""`training.weight_search`: a search without gradients, on scores whose best weights are known."""

from collections.abc import Callable

import pytest

from training.weight_search import Weights, best_of, search, starting_points

MAX_WEIGHT = 1.5


def peak(best: Weights) -> Callable[[Weights], float]:
    """Return a score that is highest at `best`, and has a ridge where the first weight is the best one."""
    return lambda weights: 1 - sum((a - b) ** 2 for a, b in zip(weights, best, strict=True)) - 0.1 * abs(weights[0] - best[0])


@pytest.mark.parametrize("best", [(0.7,), (0.8, 0.3), (1.2, 0.0, 0.6), (0.4, 1.0, 0.9, 0.2)])
def test_the_best_weights_are_found(best: Weights) -> None:
    trials = search(peak(best), starting_points(len(best)), MAX_WEIGHT, 60)
    assert best_of(trials).weights == pytest.approx(best, abs=0.03)
    assert len(trials) < 60, "the steps get small before"


def test_no_more_is_tried_than_asked_and_nothing_twice() -> None:
    calls, num_noted = list[Weights](), 0
    best, starts = peak((0.4, 1.0, 0.9, 0.2)), starting_points(4)

    def score(weights: Weights) -> float:
        calls.append(weights)
        return best(weights)

    def note() -> None:
        nonlocal num_noted
        num_noted += 1

    trials = search(score, starts, MAX_WEIGHT, 12, on_trial=note)
    assert [trial.weights for trial in trials] == calls
    assert len(calls) == len({*calls}) == num_noted == 12
    assert calls[: len(starts)] == starts


def test_weights_stay_within_their_bounds() -> None:
    trials = search(lambda weights: sum(weights), [(0.5, 0.5)], MAX_WEIGHT, 60)
    assert all(0 <= weight <= MAX_WEIGHT for trial in trials for weight in trial.weights)
    assert best_of(trials).weights == (MAX_WEIGHT, MAX_WEIGHT)
    assert best_of(search(lambda weights: -sum(weights), [(0.5, 0.5)], MAX_WEIGHT, 60)).weights == (0.0, 0.0)


def test_starting_points_are_those_that_people_try() -> None:
    assert starting_points(1) == [(1.0,), (0.5,)]
    assert starting_points(2) == [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0)]
    assert starting_points(3)[3:] == [(0.33,) * 3, (0.5,) * 3, (1.0,) * 3]
