"""Automatic weights: the shares of named adapters for a prompt, or a choice among all adapters, by their statistics.

A choice compares the prompt with every Gaussian first as if all had one covariance, which is one matrix-vector product. Only the
nearest adapters are compared exactly. Shapes: G Gaussians of all adapters, F features, K axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, log

import numpy as np
import numpy.typing as npt

from lori.prompt_statistics import Array, Background, Gaussians, ProbedPrompt, PromptStatistics, joined

GRID = 16
"""Weights are multiples of 1 / GRID, so that like prompts share their prefixes in the cache."""
NUM_NEAREST = 48
"""Gaussians whose adapters are compared exactly."""
NUM_NEARNESS = 96
"""Directions in which all adapters are compared first."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Shares:
    """The weights of adapters for one prompt, and the share that goes to the base. Multiples of 1 / GRID; their sum is 1."""

    weights: tuple[float, ...]
    base: float


def shares(z: Array, background: Background, adapters: Sequence[PromptStatistics], log_odds: float = 0.0) -> Shares:
    """Return the share of each adapter for a prompt with features z (F,), by Bayes' rule.

    `log_odds` is the logarithm of an adapter's prior probability divided by the base's: by default they are equal.
    """
    whitened = background.whiten(z)
    # All Gaussians in one call: adapter by adapter it takes ten times as long.
    by_gaussian = joined([adapter.gaussians for adapter in adapters]).log_likelihoods(whitened)
    counts = np.array([len(adapter.gaussians.means) for adapter in adapters])
    by_adapter = np.logaddexp.reduceat(by_gaussian, counts.cumsum() - counts) - np.log(counts) + log_odds
    scores = np.append(by_adapter, background.log_likelihood(whitened))
    likelihoods = np.exp(scores - scores.max())
    return _on_grid(likelihoods / fsum(likelihoods))  # an exact sum, so that the order of adapters does not matter


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
class AutoWeights:
    """The prompt from which the weights of a request's adapters are to be computed, and the adapters' statistics."""

    prompt: ProbedPrompt
    statistics: tuple[PromptStatistics, ...]
    """Of each adapter of the request, in their order."""

    def decide(self, z: Array, background: Background) -> Shares:
        """Return the shares of the adapters for the prompt's features z (F,)."""
        return shares(z, background, self.statistics)


@dataclass(frozen=True, slots=True)
class Choice:
    """The adapters for a prompt, the most fitting first, and their shares. Without any the base answers."""

    adapters: tuple[int, ...]
    """Indices of the chosen adapters."""
    shares: Shares


class PromptIndex:
    """The statistics of many adapters on one background. Never changes."""

    def __init__(self, background: Background, adapters: Sequence[PromptStatistics]) -> None:
        self._background, self._adapters = background, adapters
        if not adapters:
            return
        counts = [len(adapter.gaussians.means) for adapter in adapters]
        self._owners = np.repeat(np.arange(len(adapters)), counts)
        means = np.concatenate([adapter.gaussians.means for adapter in adapters]).astype(np.float64)  # (G, F)
        # In this space the mean covariance is the identity, and the first axes are those along which the means differ most.
        values, vectors = np.linalg.eigh(_mean_covariance([adapter.gaussians for adapter in adapters]))
        spherical = vectors / np.sqrt(values)
        _, axes = np.linalg.eigh((means @ spherical).T @ (means @ spherical))
        self._to_nearness = spherical @ axes[:, -NUM_NEARNESS:]  # (F, NUM_NEARNESS)
        points = means @ self._to_nearness
        self._points, self._constants = points.astype(np.float32), (-0.5 * (points**2).sum(1)).astype(np.float32)

    def __len__(self) -> int:
        return len(self._adapters)

    def choose(self, z: Array, max_adapters: int, threshold: float, allowed: Mask | None = None) -> Choice:
        """Return the adapters for a prompt with features z (F,): at most `max_adapters` of those that `allowed` has.

        `allowed` has a value for each adapter; None allows all. The base is as probable beforehand as all allowed adapters
        together. What adapters beyond `max_adapters` would have goes to the base. The base answers alone if the chosen ones have
        less than `threshold` together.
        """
        num_allowed = len(self) if allowed is None else int(allowed.sum())
        if not num_allowed:
            return Choice((), Shares((), 1.0))
        nearest = self._nearest(z, allowed, num_allowed)
        found = shares(z, self._background, [self._adapters[i] for i in nearest], log_odds=-log(num_allowed))
        best = sorted((-weight, int(i)) for i, weight in zip(nearest, found.weights, strict=True) if weight)[:max_adapters]
        total = -sum(weight for weight, _ in best)
        if total < threshold:
            return Choice((), Shares((), 1.0))
        return Choice(tuple(i for _, i in best), Shares(tuple(-weight for weight, _ in best), 1 - total))

    def _nearest(self, z: Array, allowed: Mask | None, num_allowed: int) -> npt.NDArray[np.intp]:
        if num_allowed <= NUM_NEAREST:
            return np.arange(len(self)) if allowed is None else np.flatnonzero(allowed)
        # The scores are those of the distances, without the term that all share.
        scores = self._points @ (self._background.whiten(z) @ self._to_nearness).astype(np.float32) + self._constants
        if allowed is not None and num_allowed < len(self):
            scores[~allowed[self._owners]] = -np.inf
        nearest = np.argpartition(scores, -NUM_NEAREST)[-NUM_NEAREST:]
        owners = np.unique(self._owners[nearest])
        return owners if allowed is None else owners[allowed[owners]]


@dataclass(frozen=True, slots=True, eq=False)
class AutoChoice:
    """The prompt for which adapters are to be chosen, and those among which. See `PromptIndex.choose`."""

    prompt: ProbedPrompt
    index: PromptIndex
    max_adapters: int
    threshold: float
    allowed: Mask | None = None

    def decide(self, z: Array, _: Background) -> Choice:
        """Return the adapters for the prompt's features z (F,)."""
        return self.index.choose(z, self.max_adapters, self.threshold, self.allowed)


def _mean_covariance(gaussians: Sequence[Gaussians]) -> Array:
    """Return the mean (F, F) of the covariances of all Gaussians."""
    num_gaussians, num_features = sum(len(one.means) for one in gaussians), gaussians[0].means.shape[1]
    total = np.zeros((num_features, num_features))
    for one in gaussians:
        # A stored axis has the square q = l / (l + v), so that l a a^T = v / (1 - q) times the axis with itself.
        squares = (one.axes.astype(np.float64) ** 2).sum(-1)  # (C, K)
        scaled = one.axes * np.sqrt(one.variances[:, None] / (1 - squares))[:, :, None]
        flat = scaled.reshape(-1, num_features)
        total += flat.T @ flat
        total[np.diag_indices(num_features)] += one.variances.sum()
    return total / num_gaussians
