"""How two adapters, or many, relate: what they share, where they pull apart, how alike their deltas are. Merges nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lori.adapter import Adapter, common_shapes
from lori.inner_products import inner_products, module_order
from lori.sparse import SparseB


@dataclass(frozen=True, slots=True)
class CommonEntries:
    """What two masks share, entry by entry: by (row, column), as a smaller rank has the first columns of a larger one."""

    num_both: int
    """Entries that both keep."""
    num_expected: float
    """Entries that both would keep if each mask were spread at random over its B."""
    num_signed: int
    """Entries that both keep, neither at zero."""
    num_conflicts: int
    """Those of `num_signed` whose signs differ."""

    @classmethod
    def total(cls, parts: Sequence["CommonEntries"]) -> "CommonEntries":
        """Returns what several modules share together."""
        return cls(
            num_both=sum(part.num_both for part in parts),
            num_expected=math.fsum(part.num_expected for part in parts),
            num_signed=sum(part.num_signed for part in parts),
            num_conflicts=sum(part.num_conflicts for part in parts),
        )


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """Two adapters, a and b, in one module, or in all together. What only one of them has is zero in the other."""

    module: str
    """Empty where it is the total."""
    num_a: int
    """Entries that a keeps."""
    num_b: int
    common: CommonEntries | None
    """None where the bases are two: an entry of B then means another direction in each."""
    square_a: float
    """|ΔW_a|², Frobenius."""
    square_b: float
    inner: float
    """<ΔW_a, ΔW_b>."""
    square_sum: float
    """|w_a ΔW_a + w_b ΔW_b|²."""

    @property
    def num_both(self) -> int | None:
        """Entries that both keep; None on two bases."""
        return self.common.num_both if self.common else None

    @property
    def overlap(self) -> float | None:
        """The share of the smaller mask that the other one has too; None on two bases, or where one keeps nothing."""
        return _share(self.common.num_both, min(self.num_a, self.num_b)) if self.common else None

    @property
    def chance_overlap(self) -> float | None:
        """What `overlap` would be if each mask were spread at random over each B; None as there."""
        return _share(self.common.num_expected, min(self.num_a, self.num_b)) if self.common else None

    @property
    def sign_conflict(self) -> float | None:
        """The share of common entries, both not zero, whose signs differ; None on two bases, or where there are none."""
        return _share(self.common.num_conflicts, self.common.num_signed) if self.common else None

    @property
    def cosine(self) -> float | None:
        """<ΔW_a, ΔW_b> / (|ΔW_a| |ΔW_b|), on any bases; None where a delta is zero."""
        cosine = _share(self.inner, self.norm_a * self.norm_b)
        return None if cosine is None else min(1.0, max(-1.0, cosine))

    @property
    def norm_a(self) -> float:
        """|ΔW_a|, Frobenius."""
        return math.sqrt(self.square_a)

    @property
    def norm_b(self) -> float:
        """|ΔW_b|, Frobenius."""
        return math.sqrt(self.square_b)

    @property
    def norm_sum(self) -> float:
        """|w_a ΔW_a + w_b ΔW_b|, Frobenius."""
        return math.sqrt(self.square_sum)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two adapters, a and b: module by module, see `module_order`, and in all."""

    modules: tuple[ModuleComparison, ...]
    total: ModuleComparison


def compare(a: Adapter, b: Adapter, weights: tuple[float, float] = (1.0, 1.0)) -> Comparison:
    """Compares two adapters of one base model; `weights` are those of their sum.

    On one basis the masks and signs are compared too. On two bases an entry of one B says nothing of the same entry in the
    other, so overlap and sign conflict are None; cosine and norms are exact on any bases. Raises `AdapterError` where the base
    models, or the shapes of a module, differ.
    """
    common_shapes((a, b))  # or it makes no sense
    rows = tuple(_compare_module(a, b, module, weights) for module in module_order((a, b)))
    return Comparison(rows, _total(rows))


def similarity_matrix(adapters: Sequence[Adapter]) -> NDArray[np.float64]:
    """Returns the cosines (n, n) fp64 of the whole deltas of `adapters`, on any bases; NaN where a delta is zero.

    Each A is drawn once. Raises as `compare`.
    """
    common_shapes(adapters)  # or it makes no sense
    inner = np.zeros((len(adapters), len(adapters)))
    for module in module_order(adapters):
        inner += inner_products(adapters, module)
    norms = np.sqrt(inner.diagonal())
    norms[norms == 0.0] = np.nan
    cosines: NDArray[np.float64] = inner / np.outer(norms, norms)
    return cosines.clip(-1.0, 1.0)


def common_entries(a: Adapter, b: Adapter, module: str) -> CommonEntries | None:
    """Returns what the masks of two adapters share in one module; None on two bases."""
    return _common(a.modules.get(module), b.modules.get(module)) if a.basis == b.basis else None


def _compare_module(a: Adapter, b: Adapter, module: str, weights: tuple[float, float]) -> ModuleComparison:
    products = inner_products((a, b), module)
    sparse_a, sparse_b = a.modules.get(module), b.modules.get(module)
    return ModuleComparison(
        module=module,
        num_a=sparse_a.values.numel() if sparse_a else 0,
        num_b=sparse_b.values.numel() if sparse_b else 0,
        common=common_entries(a, b, module),
        square_a=float(products[0, 0]),
        square_b=float(products[1, 1]),
        inner=float(products[0, 1]),
        square_sum=max(0.0, float(np.asarray(weights) @ products @ np.asarray(weights))),
    )


def _common(a: SparseB | None, b: SparseB | None) -> CommonEntries:
    if a is None or b is None:
        return CommonEntries(0, 0.0, 0, 0)
    places_a, places_b = _places(a, b.shape[1]), _places(b, a.shape[1])
    both, in_a, in_b = np.intersect1d(places_a, places_b, assume_unique=True, return_indices=True)
    signs = a.values[torch.from_numpy(in_a)].sign().double() * b.values[torch.from_numpy(in_b)].sign().double()
    return CommonEntries(
        num_both=len(both),
        num_expected=a.shape[0] * min(a.shape[1], b.shape[1]) * a.density * b.density,
        num_signed=int((signs != 0).sum()),
        num_conflicts=int((signs < 0).sum()),
    )


def _places(b: SparseB, other_rank: int) -> NDArray[np.int64]:
    """Returns positions (K,) that mean the same row and column in a B of `other_rank`."""
    places = b.rows * max(b.shape[1], other_rank) + b.indices.long() % b.shape[1]
    return np.asarray(places.numpy(), np.int64)


def _total(rows: Sequence[ModuleComparison]) -> ModuleComparison:
    common = [row.common for row in rows if row.common]
    return ModuleComparison(
        module="",
        num_a=sum(row.num_a for row in rows),
        num_b=sum(row.num_b for row in rows),
        common=CommonEntries.total(common) if common else None,
        square_a=math.fsum(row.square_a for row in rows),
        square_b=math.fsum(row.square_b for row in rows),
        inner=math.fsum(row.inner for row in rows),
        square_sum=math.fsum(row.square_sum for row in rows),
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
