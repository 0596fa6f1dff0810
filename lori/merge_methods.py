"""How the sparse B's of one module become one: pruned first or not, then summed, or averaged where their signs agree.

Knows nothing of adapters; everything is float64.
Shapes: D outputs, R rank, K kept entries, n adapters, U positions that any of them keeps.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from lori.errors import AdapterError
from lori.mask import largest
from lori.sparse import SparseB

MergeMethod = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude"]
"""The exact sum; TIES (arXiv 2306.01708); DARE (arXiv 2311.03099), summed or as TIES; the sum of each one's largest entries."""
MERGE_METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)

SignMethod = Literal["total", "frequency"]
"""How TIES elects a sign: by the sum of the values, or by the number of values of each sign."""
SIGN_METHODS: tuple[SignMethod, ...] = get_args(SignMethod)


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How adapters are merged. Raises `AdapterError` for what is no method, and a density out of range."""

    method: MergeMethod = "linear"
    """Only `linear` merges adapters on several bases."""
    density: float = 0.5
    """The share of each adapter's kept entries that survive the pruning, 0 < density <= 1; `linear` prunes nothing.

    PEFT's is the share of all entries of a tensor, most of which a sparse B has not: it would often prune nothing.
    """
    sign: SignMethod = "total"
    """How `ties` and `dare_ties` elect a sign."""
    seed: int = 0
    """Of the entries that `dare_linear` and `dare_ties` drop."""

    def __post_init__(self) -> None:
        if self.method not in MERGE_METHODS:
            raise AdapterError(f"method is {self.method!r}, expected one of {', '.join(MERGE_METHODS)}")
        if self.sign not in SIGN_METHODS:
            raise AdapterError(f"sign is {self.sign!r}, expected one of {', '.join(SIGN_METHODS)}")
        if not 0 < self.density <= 1:
            raise AdapterError(f"density is {self.density}, expected 0 < density <= 1")

    @property
    def is_random(self) -> bool:
        """Says whether the entries that survive are drawn."""
        return self.method in ("dare_linear", "dare_ties")

    @property
    def elects_sign(self) -> bool:
        """Says whether values of the lesser sign are left out."""
        return self.method in ("ties", "dare_ties")

    @property
    def used(self) -> Mapping[str, str | float]:
        """Those of the options that have an effect, by name."""
        used: dict[str, str | float] = {"method": self.method}
        if self.method != "linear":
            used["density"] = self.density
        if self.elects_sign:
            used["sign"] = self.sign
        if self.is_random:
            used["seed"] = self.seed
        return used


DEFAULTS = MergeOptions()


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
