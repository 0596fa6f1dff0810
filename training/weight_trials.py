"""Weights of a merge as numbers: of each adapter, in each block of layers."""

from collections.abc import Sequence
from dataclasses import dataclass

NUM_DIGITS = 2
"""Decimal places of the weights that are tried."""
EQUAL = (0.5, 1.0)
"""Weights of all adapters that are tried first, beside 1/n."""

Weights = tuple[float, ...]
"""Those of the first adapter, one for each block of layers, then those of the next."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Weights that were tried, and their score."""

    weights: Weights
    score: float
    step: int = 0
    """The step of the descent after which they were scored; 0 for weights that were tried before it."""


def best_of(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the highest score, of equal ones the first."""
    return max(trials, key=lambda trial: trial.score)


def unit_weights(num_adapters: int) -> list[Weights]:
    """Return the weights of each adapter alone."""
    return [tuple(float(i == j) for j in range(num_adapters)) for i in range(num_adapters)]


def equal_weights(num_adapters: int) -> list[Weights]:
    """Return the weights that people try first for all adapters together: 1/n, 0.5 and 1 each."""
    return [*dict.fromkeys((weight,) * num_adapters for weight in (round(1 / num_adapters, NUM_DIGITS), *EQUAL))]


def repeat_in_blocks(weights: Weights, num_blocks: int) -> Weights:
    """Return each adapter's weight once for each block of layers."""
    return tuple(weight for weight in weights for _ in range(num_blocks))


def split_blocks(weights: Weights, num_blocks: int) -> list[Weights]:
    """Return the weights of each adapter, one for each block."""
    return [weights[i : i + num_blocks] for i in range(0, len(weights), num_blocks)]
