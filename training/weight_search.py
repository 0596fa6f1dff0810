"""A search for the weights of a merge, without gradients.

It takes the best of some starting points and continues with COBYQA (Ragonneau 2022) in scipy: a trust-region method that fits
quadratic models to the scores so far.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from lori.prompt_statistics import Array

INITIAL_RADIUS, FINAL_RADIUS = 0.25, 0.02
"""Radius of the trust region, in weights: at the start, and where the search ends."""
NUM_DIGITS = 2
"""Decimal places of the weights that are tried."""
EVEN = (0.5, 1.0)
"""Weights of all adapters that are tried first, beside 1/n."""

Weights = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """Weights that were tried, and their score."""

    weights: Weights
    score: float


class _SearchEndedError(Exception):
    """All trials are used up. scipy's `maxfev` would also count points that round to one that was tried."""


def search(
    score: Callable[[Weights], float],
    starts: Sequence[Weights],
    max_weight: float,
    num_trials: int,
    on_trial: Callable[[], object] = lambda: None,
    known: Sequence[Trial] = (),
) -> list[Trial]:
    """Return what was tried, in order: first the `starts`. Higher scores are better.

    The weights are between 0 and `max_weight`, a number with `NUM_DIGITS` decimal places, and so must be the starts. At most
    `num_trials` are tried, and fewer if the steps of the search get too small before. Calls `on_trial` after each. `known` trials
    are not tried again, and the search may continue from the best of them.
    """
    from scipy.optimize import Bounds, minimize  # noqa: PLC0415  # an extra

    assert all(0 <= weight <= max_weight for start in starts for weight in start)
    assert len(starts) <= num_trials
    scores = {trial.weights: trial.score for trial in known}
    most = len(scores) + num_trials

    def evaluate(weights: Sequence[float] | Array) -> float:
        rounded = tuple(round(float(weight), NUM_DIGITS) for weight in weights)
        if rounded not in scores:
            if len(scores) == most:
                raise _SearchEndedError
            scores[rounded] = score(rounded)
            on_trial()
        return -scores[rounded]

    for start in starts:
        evaluate(start)
    first = np.array(max(scores, key=scores.__getitem__))
    bounds = Bounds(np.zeros_like(first), np.full_like(first, max_weight))
    options = {"initial_tr_radius": INITIAL_RADIUS, "final_tr_radius": FINAL_RADIUS}
    with suppress(_SearchEndedError):
        minimize(evaluate, first, method="COBYQA", bounds=bounds, options=options)
    return [Trial(*trial) for trial in scores.items()][len(known) :]


def best_of(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the highest score, of equal ones the first."""
    return max(trials, key=lambda trial: trial.score)


def unit_weights(num_adapters: int) -> list[Weights]:
    """Return the weights of each adapter alone."""
    return [tuple(float(i == j) for j in range(num_adapters)) for i in range(num_adapters)]


def even_weights(num_adapters: int) -> Weights:
    """Return 1/n for each adapter."""
    return (round(1 / num_adapters, NUM_DIGITS),) * num_adapters


def repeat_in_blocks(weights: Weights, num_blocks: int) -> Weights:
    """Return each adapter's weight once for each block of layers."""
    return tuple(weight for weight in weights for _ in range(num_blocks))


def split_blocks(weights: Weights, num_blocks: int) -> list[Weights]:
    """Return the weights of each adapter, one for each block."""
    return [weights[i : i + num_blocks] for i in range(0, len(weights), num_blocks)]


def starting_points(num_adapters: int) -> list[Weights]:
    """Return the weights that people try first: each adapter alone, 1/n, 0.5 and 1 each."""
    even = [even_weights(num_adapters), *((weight,) * num_adapters for weight in EVEN)]
    return [*dict.fromkeys([*unit_weights(num_adapters), *even])]
