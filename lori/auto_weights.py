"""Automatic weights: the shares of named adapters for a prompt, or a selection among all adapters, by their statistics.

A selection first compares the prompt with every Gaussian as linear discriminant analysis does: as if all had one covariance, and
along the directions in which their means differ most. The nearest are compared exactly. If there are few Gaussians, all are.
Shapes: G Gaussians of all adapters, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import exp, fsum, log
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from lori.flat_index import NUM_DIMENSIONS, BoolArray, FlatIndex
from lori.gaussians import Array, Component, log_likelihoods, logsumexp, mean_covariance
from lori.prompt_statistics import Background, ProbedPrompt, PromptStatistics

GRID = 16
"""Weights are multiples of 1 / GRID, so that like prompts share their prefixes in the cache."""
TEMPERATURE = 3.0
"""Temperature of the softmax that splits the adapters' share among them. At 1 nearly all of it goes to one of several adapters
for like prompts, often the wrong one."""
MAX_EXACT = 128
"""Up to so many Gaussians are all compared exactly."""
NUM_NEAREST = 16
"""Gaussians that are compared exactly if there are more."""
MAX_FORMS_PER_ADAPTER = 4
"""Maximum number of an adapter's Gaussians among the nearest, so that one with many alike does not crowd out the others. All
Gaussians of an adapter with so many are compared."""
MAX_ORIGIN = 64.0
"""Largest magnitude of an entry of the flat index's origin. With copies of the demo adapters' statistics it is at most 13.3."""
MAX_DISTANCE = 4.0
"""Means that lie further than this from the background's, in multiples of the median distance, are moved to this distance before
the directions are computed."""
NUM_AVERAGED = 1000
"""Maximum number of adapters whose covariances are averaged."""
NUM_DRAWS = 64
"""Number of prompts that `mean_weights` draws, about equally many of each form."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The weights of adapters for one prompt, and the share that goes to the base. Multiples of 1 / GRID; their sum is 1."""

    weights: tuple[float, ...]
    base: float

    def kept(self, places: Sequence[int]) -> "Shares":
        """Return the shares of the adapters at `places`, at least one. What the others had is divided among them."""
        weights = [self.weights[place] for place in places]
        factor = (1 - self.base) / sum(weights)
        return _on_grid([*(factor * weight for weight in weights), self.base])


def shares(z: Array, background: Background, adapters: Sequence[PromptStatistics]) -> Shares:
    """Return the share of each adapter, at least one, for a prompt with features z (F,).

    Bayes' rule gives the share of all adapters together. It is split in proportion to each one's likelihood to the power
    1 / `TEMPERATURE`.
    """
    mixtures = [adapter.gaussians.components for adapter in adapters]
    return _shares(*_compare(background.whiten(z), background, mixtures))


def _compare(whitened: Array, background: Background, adapters: Sequence[Sequence[Component]]) -> tuple[list[float], float]:
    """Return each adapter's log-likelihood, and the log-odds of all together against the base.

    Components of an adapter that are not given count as infinitely unlikely.
    """
    components = [component for mixture in [*adapters, background.gaussians.components] for component in mixture]
    by_gaussian = iter(log_likelihoods(components, whitened).tolist())
    scores = [logsumexp([*islice(by_gaussian, len(mixture))]) - log(len(mixture[0][0].means)) for mixture in adapters]
    return scores, logsumexp(scores) + background.log_odds - background.log_likelihood(whitened, [*by_gaussian])


def _shares(scores: Sequence[float], log_odds: float) -> Shares:
    adapters, base = _softmax([log_odds, 0.0])
    return _on_grid([*(adapters * share for share in _softmax([score / TEMPERATURE for score in scores])), base])


def _softmax(scores: Sequence[float]) -> list[float]:
    largest = max(scores)
    exponentials = [exp(score - largest) for score in scores]
    total = fsum(exponentials)
    return [one / total for one in exponentials]


def mean_weights(background: Background, adapters: Sequence[PromptStatistics], prompts: PromptStatistics) -> Array:
    """Return the mean weight of each of `adapters` on prompts of one adapter, drawn at random from its statistics.

    The estimate is optimistic: the prompts come from the Gaussians that judge them, and none has another form.
    """
    draws = prompts.gaussians.draw(max(1, NUM_DRAWS // len(prompts.gaussians.means)), seed=0)
    mixtures = [adapter.gaussians.components for adapter in adapters]
    prompt_shares = [_shares(*_compare(z, background, mixtures)) for z in draws.reshape(-1, draws.shape[-1])]
    weights: Array = np.array([each.weights for each in prompt_shares])
    mean: Array = weights.mean(0)
    return mean


def _on_grid(exact: Sequence[float]) -> Shares:
    """Return shares on the grid by the largest remainder method. The last is the base's, which gets what is left over.

    Equal remainders are rounded up together or not at all, so that the order of adapters does not matter.
    """
    counts = [int(share * GRID + 1e-9) for share in exact]
    remainders = [share * GRID - count for share, count in zip(exact, counts, strict=True)]
    num_left = GRID - sum(counts)
    for remainder in sorted(set(remainders), reverse=True):
        tied = [i for i, other in enumerate(remainders) if other == remainder]
        if len(tied) > num_left:
            break
        for i in tied:
            counts[i] += 1
        num_left -= len(tied)
    counts[-1] += num_left
    *weights, base = (count / GRID for count in counts)
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
    """Size of the index's own arrays. What the statistics keep for comparisons is not among them."""

    def __init__(self, background: Background, adapters: Sequence[PromptStatistics]) -> None:
        self._background, self._adapters = background, adapters
        if not adapters:
            return
        counts = [len(adapter.gaussians.means) for adapter in adapters]
        self._owners = np.repeat(np.arange(len(adapters), dtype=np.int32), counts)
        self._forms = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        self._all_forms = np.ones(len(self._owners), dtype=bool)  # gathering it for each prompt would take longer
        for adapter in adapters:
            adapter.gaussians.prepare()
        means = np.concatenate([adapter.gaussians.means for adapter in adapters]).astype(np.float64)  # (G, F)
        self._discriminants = _linear_discriminants(means, counts, adapters)
        points = means @ self._discriminants
        # Each adapter counts once, however many forms it has. If most are far away, the limit keeps the origin near the rest.
        centres = np.add.reduceat(points, np.flatnonzero(self._forms == 0)) / np.array(counts)[:, None]
        self._points = FlatIndex(points, np.clip(np.median(centres, axis=0), -MAX_ORIGIN, MAX_ORIGIN), self._owners)
        arrays = (self._discriminants, self._forms, self._all_forms)
        self.num_bytes = self._points.num_bytes + sum(array.nbytes for array in arrays)

    def __len__(self) -> int:
        return len(self._adapters)

    @cached_property
    def max_compared(self) -> int:
        """Number of Gaussians, at most, with which a prompt is compared exactly."""
        counts = [len(adapter.gaussians.means) for adapter in self._adapters]
        if (num_gaussians := sum(counts)) > MAX_EXACT:
            num_gaussians = max(MAX_EXACT, NUM_NEAREST + NUM_NEAREST // MAX_FORMS_PER_ADAPTER * max(counts))
        return num_gaussians + len(self._background.gaussians.means)

    def select(self, z: Array, max_adapters: int, allowed: BoolArray) -> Selection:
        """Return at most `max_adapters` of the adapters for which `allowed` is true, for a prompt with features z (F,).

        All allowed adapters together have the prior of one. Those selected split the share of all by their likelihoods.
        """
        num_allowed = np.count_nonzero(allowed)
        if not num_allowed:
            return Selection((), Shares((), 1.0))
        whitened = self._background.whiten(z)
        nearest = self._nearest(whitened, allowed)
        compared: dict[int, list[Component]] = {}
        for owner, form in zip(self._owners[nearest].tolist(), self._forms[nearest].tolist(), strict=True):
            compared.setdefault(owner, []).append((self._adapters[owner].gaussians, form))
        for owner, components in compared.items():
            if len(components) == MAX_FORMS_PER_ADAPTER:
                compared[owner] = self._adapters[owner].gaussians.components
        scores, log_odds = _compare(whitened, self._background, [*compared.values()])
        best = sorted(zip(scores, compared, strict=True), reverse=True, key=lambda pair: pair[0])[:max_adapters]
        result = _shares([score for score, _ in best], log_odds - log(num_allowed))
        weights = tuple(weight for weight in result.weights if weight)  # no weight is greater than one before it
        return Selection(tuple(owner for _, owner in best[: len(weights)]), Shares(weights, result.base))

    def _nearest(self, whitened: Array, allowed: BoolArray) -> npt.NDArray[np.intp]:
        """Return the sorted indices of the Gaussians that are compared exactly."""
        are_allowed = self._all_forms if allowed.all() else allowed[self._owners]
        if np.count_nonzero(are_allowed) <= MAX_EXACT:
            return np.flatnonzero(are_allowed)
        point = (whitened @ self._discriminants).astype(np.float32)
        return np.sort(self._points.nearest(point, NUM_NEAREST, are_allowed, max_per_group=MAX_FORMS_PER_ADAPTER))


def _linear_discriminants(means: Array, counts: Sequence[int], adapters: Sequence[PromptStatistics]) -> Array:
    """Return the directions (F, NUM_DIMENSIONS) in which `means` (G, F) differ most, relative to the mean covariance.

    `counts` has each adapter's number of Gaussians. No single adapter may dominate: each counts once, its covariance is scaled to
    the trace 1, and distant means are moved closer (`MAX_DISTANCE`).
    """
    covariances = np.zeros((means.shape[1], means.shape[1]))
    for i in np.unique(np.linspace(0, len(adapters) - 1, NUM_AVERAGED).astype(int)):
        covariance = mean_covariance(adapters[i].gaussians)
        covariances += covariance / np.trace(covariance)
    values, vectors = np.linalg.eigh(covariances)
    whitening = vectors / np.sqrt(values)  # to a space in which the mean covariance is a multiple of the identity
    whitened = means @ whitening
    distances = np.linalg.norm(whitened, axis=1)
    limit = max(MAX_DISTANCE * float(np.median(distances)), np.finfo(np.float64).tiny)
    factors = limit / np.maximum(distances, limit) * np.repeat(1 / np.sqrt(counts), counts)
    scaled = whitened * factors[:, None]
    _, axes = np.linalg.eigh(scaled.T @ scaled)
    discriminants: Array = whitening @ axes[:, -NUM_DIMENSIONS:]
    return discriminants


Result_co = TypeVar("Result_co", covariant=True)


class PromptQuery(Protocol[Result_co]):
    """A prompt, and the question about adapters that its features answer."""

    @property
    def prompt(self) -> ProbedPrompt:
        """The tokens from which the features are computed."""

    @property
    def num_gaussians(self) -> int:
        """Number of Gaussians, at most, with which the features are compared."""

    def evaluate(self, z: Array) -> Result_co:
        """Return the answer for the prompt's features z (F,)."""


@dataclass(frozen=True, slots=True)
class WeightQuery:
    """What are the automatic weights of a request?"""

    prompt: ProbedPrompt
    background: Background
    statistics: tuple[PromptStatistics, ...]
    """Of each adapter whose weight is automatic, in the request's order."""

    @property
    def num_gaussians(self) -> int:
        """See `PromptQuery`."""
        return len(self.background.gaussians.means) + sum(len(one.gaussians.means) for one in self.statistics)

    def evaluate(self, z: Array) -> Shares:
        """See `shares`."""
        return shares(z, self.background, self.statistics)


@dataclass(frozen=True, slots=True, eq=False)
class SelectionQuery:
    """Which adapters are for a request?"""

    prompt: ProbedPrompt
    index: SelectionIndex
    max_adapters: int
    allowed: BoolArray

    @property
    def num_gaussians(self) -> int:
        """See `PromptQuery`."""
        return self.index.max_compared

    def evaluate(self, z: Array) -> Selection:
        """See `SelectionIndex.select`."""
        return self.index.select(z, self.max_adapters, self.allowed)
