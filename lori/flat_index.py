"""A flat index: points in int8, in groups, and those nearest to a query by a comparison with all of them.

Shapes: G points, D dimensions.
"""

from collections import Counter

import numpy as np
import numpy.typing as npt

from lori.gaussians import MAX_INTEGER, Array, as_float32
from lori.native import MODULE

NUM_DIMENSIONS = 96
"""D; must equal kDimensions in bind_points.cpp."""
BLOCK_SIZE = 4096
"""Points that NumPy compares at a time, so that they stay in the CPU's cache in float32."""

BoolArray = npt.NDArray[np.bool_]


class FlatIndex:
    """Points in int8. Each has a scale of its own, so that one far point does not make the others less exact. Never changes."""

    def __init__(self, points: Array, origin: Array, groups: npt.NDArray[np.int32]) -> None:
        """Quantize `points` (G, D) relative to `origin` (D,), which changes only the rounding: points near it are more exact.

        `groups` (G,) has each point's group.
        """
        self._origin, self._groups = as_float32(origin), groups
        points = points - self._origin
        self._scales = np.maximum(as_float32(np.abs(points).max(1) / MAX_INTEGER), np.finfo(np.float32).tiny)
        self._integers = np.round(points / self._scales[:, None]).astype(np.int8)
        # Added to p^T x, -|p|^2 / 2 ranks points as their distance to x does.
        squares = (self._integers.astype(np.float64) ** 2).sum(1)
        self._constants = as_float32(-0.5 * self._scales.astype(np.float64) ** 2 * squares)

    @property
    def num_bytes(self) -> int:
        """Size of the points, 108 bytes each, and of the origin."""
        arrays = (self._integers, self._scales, self._constants, self._groups, self._origin)
        return sum(array.nbytes for array in arrays)

    def nearest(
        self, query: npt.NDArray[np.float32], count: int, allowed: BoolArray, max_per_group: int
    ) -> npt.NDArray[np.int64]:
        """Return the indices, in any order, of the points nearest to `query` (D,) among those that `allowed` (G,) has.

        They are at most `count`, and at most `max_per_group` of each group.
        """
        query = query - self._origin
        if MODULE:
            arrays = (self._integers, self._scales, self._constants, self._groups)
            return MODULE.nearest(*arrays, allowed, query, count, max_per_group)
        blocks = np.split(self._integers, range(BLOCK_SIZE, len(self._integers), BLOCK_SIZE))
        products = np.concatenate([block.astype(np.float32) @ query for block in blocks])
        indices = np.flatnonzero(allowed)
        nearest, sizes = list[int](), Counter[int]()
        for index in indices[np.argsort(-(self._scales * products + self._constants)[indices])]:
            group = int(self._groups[index])
            if sizes[group] < max_per_group:
                sizes[group] += 1
                nearest.append(int(index))
            if len(nearest) == count:
                break
        return np.array(nearest, np.int64)
