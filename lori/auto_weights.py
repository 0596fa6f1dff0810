"""Automatic weights: the shares of named adapters for a prompt, or a selection among all adapters, by their statistics.

A selection first compares the prompt with every Gaussian as linear discriminant analysis does: as if all had one covariance, and
along the directions in which their means differ most. That is one matrix-vector product. The nearest are compared in more such
directions, and the nearest of these exactly. If there are few Gaussians, all are compared exactly.
Shapes: G Gaussians of all adapters, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, log
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from lori.gaussians import Array, Component, as_float32, log_likelihoods, mean_covariance
from lori.prompt_statistics import Background, ProbedPrompt, PromptStatistics

GRID = 16
"""Weights are multiples of 1 / GRID, so that like prompts share their prefixes in the cache."""
LOG_ODDS = -7.0
"""Logarithm of the ratio of an adapter's prior probability to the base's. Chosen on held-out prompts: without it, too many of
nobody's go to an adapter."""
MAX_EXACT = 128
"""Up to so many Gaussians are all compared exactly."""
NUM_NEAREST = 32
"""Gaussians that are compared exactly if there are more."""
NUM_AVERAGED = 1000
"""Maximum number of adapters whose covariances are averaged."""
NUM_FIRST_DISCRIMINANTS, NUM_DISCRIMINANTS = 32, 96
"""Directions in which all Gaussians are compared first, and those in which the nearest of them are."""
NUM_CANDIDATES = 500
"""Gaussians, roughly, that are compared in all of these directions."""
SAMPLE = np.random.default_rng(0).random(2000)
"""The places of a sample of scores, as fractions of their number."""
NUM_DRAWS = 64
"""Number of prompts that `mean_weights` draws, about equally many of each form."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Shares:
    """The weights of adapters for one prompt, and the share that goes to the base. Multiples of 1 / GRID; their sum is 1."""

    weights: tuple[float, ...]
    base: float


def shares(z: Array, background: Background, adapters: Sequence[PromptStatistics], log_odds: float = LOG_ODDS) -> Shares:
    """Return the share of each adapter for a prompt with features z (F,), by Bayes' rule.

    `log_odds` is the logarithm of an adapter's prior probability divided by the base's.
    """
    return _shares(background.whiten(z), background, [adapter.gaussians.components for adapter in adapters], log_odds)


def _shares(whitened: Array, background: Background, adapters: Sequence[Sequence[Component]], log_odds: float) -> Shares:
    # Components of an adapter that are not given count as infinitely unlikely.
    mixtures = [*adapters, background.gaussians.components]
    by_gaussian = log_likelihoods([component for mixture in mixtures for component in mixture], whitened)
    num_compared = np.array([len(mixture) for mixture in mixtures])
    *adapter_starts, background_start = num_compared.cumsum() - num_compared
    num_gaussians = np.array([len(gaussians.means) for (gaussians, _), *_ in adapters])
    by_adapter = np.logaddexp.reduceat(by_gaussian[:background_start], adapter_starts) - np.log(num_gaussians) + log_odds
    scores = np.append(by_adapter, background.log_likelihood(whitened, by_gaussian[background_start:]))
    likelihoods = np.exp(scores - scores.max())
    return _on_grid(likelihoods / fsum(likelihoods))  # an exact sum, so that the order of adapters does not matter


def mean_weights(background: Background, adapters: Sequence[PromptStatistics], prompts: PromptStatistics) -> Array:
    """Return the mean weight of each of `adapters` on prompts of one adapter, drawn at random from its statistics.

    The estimate is optimistic: the prompts come from the Gaussians that judge them, and none has another form.
    """
    draws = prompts.gaussians.draw(max(1, NUM_DRAWS // len(prompts.gaussians.means)), seed=0)
    mixtures = [adapter.gaussians.components for adapter in adapters]
    weights: Array = np.array([_shares(z, background, mixtures, LOG_ODDS).weights for z in draws.reshape(-1, draws.shape[-1])])
    mean: Array = weights.mean(0)
    return mean


def _on_grid(exact: Array) -> Shares:
    """Return shares on the grid: the largest remainders are rounded up. What is left over goes to the base.

    Equal remainders are rounded up together or not at all, so that the order of adapters does not matter.
    """
    counts = np.floor(exact * GRID + 1e-9).astype(int)
    remainders = exact * GRID - counts
    num_left = GRID - int(counts.sum())
    for remainder in np.unique(remainders)[::-1]:
        is_tied = remainders == remainder
        if is_tied.sum() > num_left:
            break
        counts[is_tied] += 1
        num_left -= int(is_tied.sum())
    counts[-1] += num_left
    *weights, base = (int(count) / GRID for count in counts)
    return Shares(tuple(weights), base)


@dataclass(frozen=True, slots=True)
class Selection:
    """The adapters selected for a prompt, the most fitting first, and their shares."""

    adapters: tuple[int, ...]
    """Indices of the selected adapters."""
    shares: Shares


class SelectionIndex:
    """The statistics of many adapters on one background. Never changes."""

    num_bytes = 0
    """Size of what the index holds beside the statistics."""

    def __init__(self, background: Background, adapters: Sequence[PromptStatistics]) -> None:
        self._background, self._adapters = background, adapters
        if not adapters:
            return
        counts = np.array([len(adapter.gaussians.means) for adapter in adapters])
        self._owners, self._starts = np.repeat(np.arange(len(adapters)), counts), counts.cumsum() - counts
        for adapter in adapters:
            _ = adapter.gaussians.log_determinants  # cached: a selection should not wait for them
        means = np.concatenate([adapter.gaussians.means for adapter in adapters]).astype(np.float64)  # (G, F)
        places = np.unique(np.linspace(0, len(adapters) - 1, NUM_AVERAGED).astype(int))
        values, vectors = np.linalg.eigh(mean_covariance([adapters[i].gaussians for i in places]))
        spherical = vectors / np.sqrt(values)  # to a space in which the mean covariance is the identity
        _, axes = np.linalg.eigh((means @ spherical).T @ (means @ spherical))
        self._discriminants = spherical @ axes[:, : -NUM_DISCRIMINANTS - 1 : -1]  # (F, NUM_DISCRIMINANTS), the greatest first
        points = means @ self._discriminants
        first_points = points[:, :NUM_FIRST_DISCRIMINANTS]
        self._points, self._constants = as_float32(points), _score_constants(points)
        self._first_points = as_float32(first_points.T)  # (NUM_FIRST_DISCRIMINANTS, G)
        self._first_constants = _score_constants(first_points)
        arrays = (self._owners, self._starts, self._discriminants, self._points, self._constants)
        self.num_bytes = sum(array.nbytes for array in (*arrays, self._first_points, self._first_constants))

    def __len__(self) -> int:
        return len(self._adapters)

    def select(self, z: Array, max_adapters: int, allowed: Mask) -> Selection:
        """Return the adapters for a prompt with features z (F,): at most `max_adapters` of those that `allowed` (one each) has.

        All allowed adapters together have the prior log-odds `LOG_ODDS`. The base gets the shares of those beyond `max_adapters`.
        """
        num_allowed = int(allowed.sum())
        if not num_allowed:
            return Selection((), Shares((), 1.0))
        whitened = self._background.whiten(z)
        nearest = self._nearest(whitened, allowed)
        owners = self._owners[nearest]
        compared: dict[int, list[Component]] = {}
        for owner, form in zip(owners.tolist(), (nearest - self._starts[owners]).tolist(), strict=True):
            compared.setdefault(owner, []).append((self._adapters[owner].gaussians, form))
        result = _shares(whitened, self._background, [*compared.values()], LOG_ODDS - log(num_allowed))
        fitting = [(weight, owner) for owner, weight in zip(compared, result.weights, strict=True) if weight]
        best = sorted(fitting, key=lambda pair: (-pair[0], pair[1]))[:max_adapters]
        weights = tuple(weight for weight, _ in best)
        return Selection(tuple(i for _, i in best), Shares(weights, 1 - sum(weights)))

    def _nearest(self, whitened: Array, allowed: Mask) -> npt.NDArray[np.intp]:
        """Return the sorted indices of the Gaussians that are compared exactly."""
        are_all = bool(allowed.all())
        rows = np.arange(len(self._owners)) if are_all else np.flatnonzero(allowed[self._owners])
        if len(rows) <= MAX_EXACT:
            return rows
        point = (whitened @ self._discriminants).astype(np.float32)
        if len(rows) > 2 * NUM_CANDIDATES:
            scores = point[:NUM_FIRST_DISCRIMINANTS] @ self._first_points + self._first_constants
            rows = rows[_candidates(scores if are_all else scores[rows])]
        scores = self._points[rows] @ point + self._constants[rows]
        return np.sort(rows[np.argsort(scores)[-NUM_NEAREST:]])


def _score_constants(points: Array) -> npt.NDArray[np.float32]:
    """Return -|p|^2 / 2 for each of `points` (G, D): added to p^T x, it ranks points as their distance to x does."""
    return as_float32(-0.5 * (points**2).sum(1))


def _candidates(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """Return the indices of roughly the `NUM_CANDIDATES` greatest scores: the least of them is estimated from a sample."""
    sample = scores[(SAMPLE * len(scores)).astype(np.intp)]
    rank = max(1, NUM_CANDIDATES * len(SAMPLE) // len(scores))
    return np.flatnonzero(scores >= np.partition(sample, -rank)[-rank])


Result_co = TypeVar("Result_co", covariant=True)


class PromptQuery(Protocol[Result_co]):
    """A prompt, and the question about adapters that its features answer."""

    @property
    def prompt(self) -> ProbedPrompt:
        """The tokens from which the features are computed."""

    def evaluate(self, z: Array) -> Result_co:
        """Return the answer for the prompt's features z (F,)."""


@dataclass(frozen=True, slots=True)
class WeightQuery:
    """What are the automatic weights of a request?"""

    prompt: ProbedPrompt
    background: Background
    statistics: tuple[PromptStatistics, ...]
    """Of each adapter whose weight is automatic, in the request's order."""

    def evaluate(self, z: Array) -> Shares:
        """See `shares`."""
        return shares(z, self.background, self.statistics)


@dataclass(frozen=True, slots=True, eq=False)
class SelectionQuery:
    """Which adapters are for a request?"""

    prompt: ProbedPrompt
    index: SelectionIndex
    max_adapters: int
    allowed: Mask

    def evaluate(self, z: Array) -> Selection:
        """See `SelectionIndex.select`."""
        return self.index.select(z, self.max_adapters, self.allowed)
