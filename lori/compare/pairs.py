"""Comparison of two adapters, or of many pair by pair: shared entries, opposed signs, cosines of their deltas. Merges nothing.

A delta is (alpha/r) B A. Inner products of deltas need no (D, N) matrix: <B_a A_a, B_b A_b> = sum((B_a G) * B_b) with G = A_a
A_bᵀ. They are exact on any bases. For many adapters each A is drawn once. Shapes: D outputs, N inputs, R rank of a module.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lori.adapter import Adapter, common_shapes
from lori.basis import Basis
from lori.identity import last, layer, natural
from lori.sparse import SparseB


def inner_products(adapters: Sequence[Adapter], module: str) -> NDArray[np.float64]:
    """Return <ΔW_i, ΔW_j> (n, n) fp64 in one module, zero for an adapter without it.

    Each basis draws A once, at its largest rank. The adapters must be of one base model.
    """
    members: defaultdict[Basis, list[int]] = defaultdict(list)
    for i, adapter in enumerate(adapters):
        if module in adapter.modules:
            members[adapter.basis].append(i)
    factors = {basis: _factors([adapters[i] for i in group], module) for basis, group in members.items()}
    out = np.zeros((len(adapters), len(adapters)))
    for basis_i, (b_i, a_i) in factors.items():
        for basis_j, (b_j, a_j) in factors.items():
            products = (b_i @ (a_i @ a_j.T)).flatten(1) @ b_j.flatten(1).T
            out[np.ix_(members[basis_i], members[basis_j])] = products.numpy()
    out = (out + out.T) / 2
    np.fill_diagonal(out, out.diagonal().clip(0.0))  # a product that cancels may round below zero
    return out


def module_order(adapters: Iterable[Adapter]) -> list[str]:
    """Return every module that one of `adapters` changes: by layer, then in the order of `target_modules`.

    An adapter read from a file has no order of its own.
    """
    adapters = list(adapters)
    targets = dict.fromkeys(target for adapter in adapters for target in adapter.config.target_modules)
    places = {target: i for i, target in enumerate(targets)}

    def key(module: str) -> tuple[object, ...]:
        place = places.get(module, places.get(last(module), len(places)))
        return natural(layer(module)), place, natural(module)

    return sorted({module for adapter in adapters for module in adapter.modules}, key=key)


def _factors(adapters: Sequence[Adapter], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (alpha/r) B (n, D, R) and the A (R, N) of adapters on one basis, fp64; a smaller rank has columns of zeros."""
    scaled = [adapter.config.scale_of(module) * adapter.modules[module].dense(torch.float64) for adapter in adapters]
    rank = max(b.shape[1] for b in scaled)
    padded = [torch.nn.functional.pad(b, (0, rank - b.shape[1])) for b in scaled]
    return torch.stack(padded), adapters[0].basis.draw(module, rank, adapters[0].shape_of(module)[1]).double()


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
        """Return what several modules share together."""
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
    """Compare two adapters of one base model; `weights` are those of their sum.

    On one basis the masks and signs are compared too. On two bases an entry of one B says nothing of the same entry in the
    other, so overlap and sign conflict are None; cosine and norms are exact on any bases. Raises `AdapterError` where the base
    models, or the shapes of a module, differ.
    """
    common_shapes((a, b))  # or it makes no sense
    rows = tuple(_compare_module(a, b, module, weights) for module in module_order((a, b)))
    return Comparison(rows, _total(rows))


def similarity_matrix(adapters: Sequence[Adapter]) -> NDArray[np.float64]:
    """Return the cosines (n, n) fp64 of the whole deltas of `adapters`, on any bases; NaN where a delta is zero.

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
    """Return what the masks of two adapters share in one module; None on two bases."""
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
    """Return positions (K,) that mean the same row and column in a B of `other_rank`."""
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


def compare_pairs(
    adapters: Sequence[Adapter], pairs: Sequence[tuple[int, int]], rest: Callable[[], None] = lambda: None
) -> list[ModuleComparison]:
    """Return the total of each of `pairs`, which are places in `adapters`; `square_sum` is at weights 1 and 1.

    `rest` is called after each module: whoever shares the machine with others may pause there. Raises as `compare`.
    """
    common_shapes(adapters)  # or it makes no sense
    inner = np.zeros((len(adapters), len(adapters)))
    common: list[list[CommonEntries]] = [[] for _ in pairs]
    for module in module_order(adapters):
        inner += inner_products(adapters, module)
        for parts, (i, j) in zip(common, pairs, strict=True):
            if part := common_entries(adapters[i], adapters[j], module):
                parts.append(part)
        rest()
    return [
        ModuleComparison(
            module="",
            num_a=adapters[i].num_kept,
            num_b=adapters[j].num_kept,
            common=CommonEntries.total(parts) if parts else None,
            square_a=float(inner[i, i]),
            square_b=float(inner[j, j]),
            inner=float(inner[i, j]),
            square_sum=max(0.0, float(inner[i, i] + inner[j, j] + 2 * inner[i, j])),
        )
        for parts, (i, j) in zip(common, pairs, strict=True)
    ]
