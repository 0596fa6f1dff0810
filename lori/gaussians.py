"""Gaussians of prompts' features, stored in few bytes: a mean, and a covariance of low rank plus a multiple of the identity.

They are in the space in which the background's covariance is the identity (`lori.prompt_statistics.Background`).
Shapes: C Gaussians, F features, K axes, P prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, fsum, log
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lori.native import MODULE

if TYPE_CHECKING:
    import _lori_cpu

NUM_AXES = 64
"""Directions in which a Gaussian has a variance of its own; in all others it has one common variance."""
MAX_INTEGER = 127
"""Largest magnitude of the integers in which axes are stored."""
MAX_NORM = 0.999
"""Largest spectral norm of a Gaussian's axes that is written. The variance along an axis is then at most about 500 v."""
REFUSED_NORM = 0.9995
"""Spectral norms from here on are refused: a distance in float32 could be negative."""
MAX_MAGNITUDE = 1e9
"""Largest magnitude of a mean, and of a variance or its inverse, that is read. Those of real prompts are below 100."""
SHRINKAGE = 0.5
"""Share of the background's covariance in that of a Gaussian."""
GAUSSIAN_NAMES = ("means", "axes", "scales", "variances")
"""Tensors of a `Gaussians`, in files too."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Gaussians:
    """C Gaussians of F features. With K axes as the rows of A, each times its scale, the covariance is v (I - A^T A)^-1.

    Where the axes are orthogonal, and have the lengths sqrt(l_k / (l_k + v)), it is v I plus variances l_k along them.
    """

    means: npt.NDArray[np.float32]
    """(C, F)"""
    axes: npt.NDArray[np.int8]
    """(C, K, F)"""
    scales: npt.NDArray[np.float32]
    """(C, K)"""
    variances: npt.NDArray[np.float32]
    """(C,), v"""

    def cholesky(self, norm: float = 1.0) -> Array:
        """Return the Cholesky factors of norm^2 I - A A^T, (C, K, K). Raises `LinAlgError` for a spectral norm from `norm` on."""
        axes = self.axes.astype(np.float32)
        squares = (axes @ axes.swapaxes(1, 2)).astype(np.float64)  # of integers, and exact
        products: Array = squares * self.scales[:, :, None] * self.scales[:, None, :]
        factors: Array = np.linalg.cholesky(norm**2 * np.eye(axes.shape[1]) - products).astype(np.float64)
        return factors

    @cached_property
    def log_determinants(self) -> Array:
        """The logarithms of the covariances' determinants, (C,)."""
        # |I - A^T A| = |I - A A^T|
        diagonals = np.diagonal(self.cholesky(), axis1=1, axis2=2)
        determinants: Array = self.means.shape[1] * np.log(self.variances.astype(np.float64)) - 2 * np.log(diagonals).sum(-1)
        return determinants

    @cached_property
    def compiled(self) -> "_lori_cpu.Gaussians":
        """These Gaussians as the compiled module takes them, if it is there."""
        return MODULE.Gaussians(self.means, self.axes, self.scales, self.variances, self.log_determinants)

    def prepare(self) -> None:
        """Compute now what the first log-likelihood would have to wait for."""
        _ = self.compiled if MODULE else self.log_determinants

    @property
    def loadings(self) -> Array:
        """Factor loadings L, (C, K, F): the covariance is v I + L^T L."""
        # (I - A^T A)^-1 = I + A^T (I - A A^T)^-1 A
        axes = self.axes * self.scales[:, :, None].astype(np.float64)
        loadings: Array = np.sqrt(self.variances)[:, None, None] * np.linalg.solve(self.cholesky(), axes)
        return loadings

    @property
    def components(self) -> list["Component"]:
        """Each of the Gaussians."""
        return [(self, i) for i in range(len(self.means))]

    def first(self, count: int) -> "Gaussians":
        """Return the first `count` of the Gaussians."""
        return Gaussians(*(np.ascontiguousarray(getattr(self, name)[:count]) for name in GAUSSIAN_NAMES))

    def draw(self, num_draws: int, seed: int) -> Array:
        """Return `num_draws` random whitened features of each Gaussian, (C, num_draws, F). A seed gives the same ones again."""
        rng = np.random.default_rng(seed)
        spherical = rng.standard_normal((len(self.means), num_draws, self.means.shape[1]))
        along = rng.standard_normal((len(self.means), num_draws, self.axes.shape[1]))
        draws: Array = self.means[:, None] + np.sqrt(self.variances)[:, None, None] * spherical + along @ self.loadings
        return draws


Component = tuple[Gaussians, int]
"""One Gaussian: those that it is one of, and its index among them."""


def log_likelihoods(components: Sequence[Component], z: Array) -> Array:
    """Return the log-likelihood of z (F,) under each of C components, (C,), without the term that all of them share."""
    if not MODULE:
        return log_likelihoods_in_numpy(components, z)
    return MODULE.log_likelihoods([gaussians.compiled for gaussians, _ in components], [i for _, i in components], z)


def log_likelihoods_in_numpy(components: Sequence[Component], z: Array) -> Array:
    """`log_likelihoods` in NumPy: slower, and equal up to rounding."""
    difference = z - np.array([gaussians.means[i] for gaussians, i in components])
    axes = np.array([gaussians.axes[i] for gaussians, i in components], np.float32)
    scales = np.array([gaussians.scales[i] for gaussians, i in components])
    projections = (axes @ difference.astype(np.float32)[..., None])[..., 0] * scales  # (C, K)
    variances = np.array([gaussians.variances[i] for gaussians, i in components])
    determinants = np.array([gaussians.log_determinants[i] for gaussians, i in components])
    distances = ((difference**2).sum(-1) - (projections.astype(np.float64) ** 2).sum(-1)) / variances
    result: Array = -0.5 * (distances + determinants)
    return result


def logsumexp(values: Sequence[float]) -> float:
    """Return log(sum(exp(values))), without overflow. It does not depend on the order of the values."""
    # For a few dozen values NumPy takes longer.
    largest = max(values)
    return largest + log(fsum(exp(value - largest) for value in values))


def fit_gaussian(z: Array, weights: Array | None = None, shrinkage: float = SHRINKAGE) -> Gaussians:
    """Return the Gaussian of z (P, F), in the whitened space, with `weights` (P,) of the prompts; C is 1."""
    share = np.full(len(z), 1 / len(z)) if weights is None else weights / weights.sum()
    mean = share @ z
    centred = z - mean
    covariance = (1 - shrinkage) * (centred.T * share) @ centred + shrinkage * np.eye(z.shape[1])
    values, vectors = np.linalg.eigh(covariance)
    variance = values[:-NUM_AXES].mean()
    excess = np.maximum(values[-NUM_AXES:] - variance, 0)
    axes, scales = _integer_axes(vectors[:, -NUM_AXES:].T, np.sqrt(excess / (excess + variance)))
    return Gaussians(as_float32(mean[None]), axes[None], as_float32(scales[None]), as_float32(np.array([variance])))


def _integer_axes(axes: Array, lengths: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """Return unit axes (K, F) as integers, and the scales (K,) that give them `lengths` (K,)."""
    integers = np.round(axes * (MAX_INTEGER / np.abs(axes).max(1))[:, None])
    scales = np.minimum(lengths, MAX_NORM) / np.linalg.norm(integers, axis=1)
    # Rounded axes are not quite orthogonal.
    norm = float(np.linalg.norm(integers * scales[:, None], 2))
    return np.ascontiguousarray(integers, np.int8), scales * (MAX_NORM / max(norm, MAX_NORM))


def as_float32(values: Array) -> npt.NDArray[np.float32]:
    """Return `values` as a contiguous array, as safetensors needs."""
    return np.ascontiguousarray(values, np.float32)


def joined(parts: Sequence[Gaussians]) -> Gaussians:
    """Return the Gaussians of all `parts`."""
    return Gaussians(*(np.concatenate([getattr(part, name) for part in parts]) for name in GAUSSIAN_NAMES))


def mean_covariance(gaussians: Gaussians) -> Array:
    """Return the mean (F, F) of the covariances of all the Gaussians."""
    num_gaussians, num_features = gaussians.means.shape
    flat = gaussians.loadings.reshape(-1, num_features)
    mean: Array = (flat.T @ flat + gaussians.variances.sum(dtype=np.float64) * np.eye(num_features)) / num_gaussians
    return mean
