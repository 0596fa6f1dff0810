"""A flat index: points in int8, and those nearest to a query by a comparison with all of them.

Shapes: G points, D dimensions.
"""

import numpy as np
import numpy.typing as npt

from lori.gaussians import Array, as_float32
from lori.native import MODULE

NUM_DIMENSIONS = 96
"""D, which the compiled module knows."""
MAX_INTEGER = 127
"""Largest magnitude of the integers in which points are stored."""

Mask = npt.NDArray[np.bool_]


class FlatIndex:
    """Points, with one scale for each dimension. Never changes."""

    def __init__(self, points: Array) -> None:
        """Quantize `points` (G, D), at least one."""
        self._scales = np.maximum(as_float32(np.abs(points).max(0) / MAX_INTEGER), np.finfo(np.float32).tiny)
        self._integers = np.round(points / self._scales).astype(np.int8)
        # Added to p^T x, -|p|^2 / 2 ranks points as their distance to x does.
        self._constants = as_float32(-0.5 * ((self._integers * self._scales.astype(np.float64)) ** 2).sum(1))

    @property
    def num_bytes(self) -> int:
        """Size of the points, 100 bytes each, and of the scales."""
        return self._scales.nbytes + self._integers.nbytes + self._constants.nbytes

    def nearest(self, query: npt.NDArray[np.float32], count: int, allowed: Mask | None = None) -> npt.NDArray[np.int64]:
        """Return the indices, in any order, of the `count` points nearest to `query` (D,), or of all if there are fewer.

        With `allowed` (G,) they are the nearest of those that it has.
        """
        if MODULE:
            return MODULE.nearest(self._integers, self._scales, self._constants, query, allowed, count)
        scores = self._integers.astype(np.float32) @ (self._scales * query) + self._constants
        indices = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
        return indices[np.argsort(scores[indices])[-count:]]
