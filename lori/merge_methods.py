"""How the sparse B's of one module become one: pruned first or not, then summed, or averaged where their signs agree.

Knows nothing of adapters; everything is float64.
Shapes: D outputs, R rank, K kept entries, n adapters, U positions that any of them keeps.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from lori.mask import largest
from lori.merge_options import MergeOptions, SignMethod
from lori.sparse import SparseB


def prune(b: SparseB, options: MergeOptions, drawn_from: str) -> SparseB:
    """Returns those entries of `b` that the method combines; `drawn_from` names the adapter and the module to a random one."""
    if options.method == "linear":
        return b
    if options.is_random:
        return drop_and_rescale(b, options.density, f"{options.seed}|{drawn_from}")
    return keep_largest(b, options.density)


def combine(deltas: Sequence[SparseB], weights: Sequence[float], options: MergeOptions) -> SparseB:
    """Returns the combination of `deltas`, (D, R) each, where any of them keeps an entry; it may hold zeros."""
    if options.elects_sign:
        return disjoint_merge(deltas, weights, options.sign)
    return weighted_sum(deltas, weights)


def placed(b: SparseB, rank: int, first: int) -> SparseB:
    """Returns `b` (D, r) as the columns from `first` on of a (D, rank) that keeps nothing else."""
    indices = b.rows * rank + first + b.indices.long() % b.shape[1]
    return SparseB((b.shape[0], rank), indices.int(), b.values)


def nonzero(b: SparseB) -> SparseB:
    """Returns `b` without the entries that are kept and zero."""
    kept = b.values != 0
    return SparseB(b.shape, b.indices[kept], b.values[kept])


def keep_largest(b: SparseB, density: float) -> SparseB:
    """Returns the round(density K) largest entries of `b`, at least one of any; the first win where some are equal."""
    count = max(1, round(density * b.values.numel()))
    positions = largest(b.values.abs(), count).sort().values
    return SparseB(b.shape, b.indices[positions], b.values[positions])


def drop_and_rescale(b: SparseB, density: float, key: str) -> SparseB:
    """Returns `b` with each entry kept with probability `density` and divided by it (DARE, arXiv 2311.03099, section 3.2).

    The draw is Philox's raw words, mapped to [0, 1) here: it depends on `key` and K, on no library's version and no order.
    """
    philox = np.random.Philox(key=int.from_bytes(hashlib.sha256(f"dare|{key}".encode()).digest()[:16], "little"))
    uniform = (philox.random_raw(b.values.numel()) >> np.uint64(11)) * 2.0**-53
    kept = torch.from_numpy(uniform < density)
    return SparseB(b.shape, b.indices[kept], b.values[kept] / density)


def weighted_sum(deltas: Sequence[SparseB], weights: Sequence[float]) -> SparseB:
    """Returns sum_i weights_i deltas_i over the union of the masks, added in the order given."""
    indices, values = _aligned(deltas)
    return SparseB(deltas[0].shape, indices, _in_order(values * _column(weights)))


def disjoint_merge(deltas: Sequence[SparseB], weights: Sequence[float], sign: SignMethod) -> SparseB:
    """Returns, at each position, the sum of the weighted values that have the elected sign, divided by their number.

    TIES (arXiv 2306.01708, algorithm 1). As in PEFT (`peft/utils/merge_utils.py`) the election does not see the weights, a draw
    elects plus, and an entry that is zero or pruned has no sign.
    """
    indices, values = _aligned(deltas)
    signs = values.sign()
    votes = _in_order(values if sign == "total" else signs)
    agree = signs == torch.where(votes >= 0, 1.0, -1.0)
    total = _in_order(values * agree * _column(weights))
    return SparseB(deltas[0].shape, indices, total / agree.sum(0).clamp(min=1))


def _aligned(deltas: Sequence[SparseB]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the positions (U,) that any of `deltas` keeps, ascending, and everyone's values there, (n, U) float64."""
    indices = torch.cat([b.indices for b in deltas]).unique()
    values = torch.zeros(len(deltas), len(indices), dtype=torch.float64)
    for row, b in zip(values, deltas, strict=True):
        row[torch.searchsorted(indices, b.indices)] = b.values.double()
    return indices, values


def _in_order(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum (U,) of the rows of `values` (n, U), one after another: torch's own order is not promised."""
    total = torch.zeros_like(values[0])
    for row in values:
        total += row
    return total


def _column(weights: Sequence[float]) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
