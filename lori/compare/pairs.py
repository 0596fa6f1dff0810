"""Comparison of adapters in pairs: common entries, sign conflicts, cosines of their deltas.

A delta is (alpha/r) B A. Inner products of deltas need no (D, N) matrix: <B_a A_a, B_b A_b> = sum((B_a G) * B_b) with
G = A_a A_bᵀ. The products are exact on any bases. For many adapters each A is drawn once. Shapes: D outputs, N inputs, R rank of
a module.
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
from lori.identity import layer_of, natural_key, projection_of
from lori.sparse import SparseB


def inner_products(adapters: Sequence[Adapter], module: str) -> NDArray[np.float64]:
    """Return <ΔW_i, ΔW_j> (n, n) fp64 in one module; zero for an adapter without the module.

    A is drawn once for each basis, at its largest rank. The adapters must have the same base model.
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
    np.fill_diagonal(out, out.diagonal().clip(0.0))  # rounding can make a squared norm negative
    return out


def module_order(adapters: Iterable[Adapter]) -> list[str]:
    """Return all modules that `adapters` change, sorted by layer, then in the order of `target_modules`.

    The modules of an adapter from a file have no order themselves.
    """
    adapters = list(adapters)
    targets = dict.fromkeys(target for adapter in adapters for target in adapter.config.target_modules)
    places = {target: i for i, target in enumerate(targets)}

    def key(module: str) -> tuple[object, ...]:
        place = places.get(module, places.get(projection_of(module), len(places)))
        return natural_key(layer_of(module)), place, natural_key(module)

    return sorted({module for adapter in adapters for module in adapter.modules}, key=key)


def _factors(adapters: Sequence[Adapter], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (alpha/r) B (n, D, R) and A (R, N) of adapters on one basis, fp64. B's of a smaller rank are padded with zeros."""
    scaled = [adapter.config.scale_of(module) * adapter.modules[module].dense(torch.float64) for adapter in adapters]
    rank = max(b.shape[1] for b in scaled)
    padded = [torch.nn.functional.pad(b, (0, rank - b.shape[1])) for b in scaled]
    return torch.stack(padded), adapters[0].basis.draw(module, rank, adapters[0].shape_of(module)[1]).double()


@dataclass(frozen=True, slots=True)
class CommonEntries:
    """Common entries of two masks, matched by (row, column). A B of smaller rank has the first columns of one of larger rank."""

    num_both: int
    """Number of entries in both masks."""
    num_expected: float
    """Expected number of entries in both masks if each mask were random."""
    num_signed: int
    """Number of entries in both masks whose values are both nonzero."""
    num_conflicts: int
    """Number of those entries whose signs differ."""

    @classmethod
    def total(cls, parts: Sequence["CommonEntries"]) -> "CommonEntries":
        """Return the sum over several modules."""
        return cls(
            num_both=sum(part.num_both for part in parts),
            num_expected=math.fsum(part.num_expected for part in parts),
            num_signed=sum(part.num_signed for part in parts),
            num_conflicts=sum(part.num_conflicts for part in parts),
        )


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """Comparison of two adapters, a and b, in one module or in total. A module that an adapter lacks counts as zero."""

    module: str
    """Full name; empty for the total."""
    num_a: int
    """Number of nonzero entries of a's B."""
    num_b: int
    """Number of nonzero entries of b's B."""
    common: CommonEntries | None
    """None if the adapters have different bases: the same entry of B then means different directions."""
    square_a: float
    """|ΔW_a|², Frobenius."""
    square_b: float
    """|ΔW_b|², Frobenius."""
    inner: float
    """<ΔW_a, ΔW_b>."""
    square_sum: float
    """|w_a ΔW_a + w_b ΔW_b|²."""

    @property
    def num_both(self) -> int | None:
        """Number of entries in both masks; None if the adapters have different bases."""
        return self.common.num_both if self.common else None

    @property
    def overlap(self) -> float | None:
        """Share of the smaller mask that is also in the other mask.

        None if the adapters have different bases, or if a mask is empty.
        """
        return _share(self.common.num_both, min(self.num_a, self.num_b)) if self.common else None

    @property
    def chance_overlap(self) -> float | None:
        """Expected `overlap` of random masks with the same number of entries; None in the same cases."""
        return _share(self.common.num_expected, min(self.num_a, self.num_b)) if self.common else None

    @property
    def sign_conflict(self) -> float | None:
        """Share of entries whose signs differ, among those that both masks keep and that are nonzero in both adapters.

        None if the adapters have different bases, or if there are no such entries.
        """
        return _share(self.common.num_conflicts, self.common.num_signed) if self.common else None

    @property
    def cosine(self) -> float | None:
        """<ΔW_a, ΔW_b> / (|ΔW_a| |ΔW_b|), on any bases; None if a delta is zero."""
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
    """Comparison of two adapters, a and b: for each module, in the order of `module_order`, and in total."""

    modules: tuple[ModuleComparison, ...]
    total: ModuleComparison


def compare(a: Adapter, b: Adapter, weights: tuple[float, float] = (1.0, 1.0)) -> Comparison:
    """Compare two adapters of one base model. `weights` are those of their sum in `square_sum`.

    If both adapters have the same basis, masks and signs are compared, too. Otherwise the entries of B are not comparable, so
    overlap and sign conflict are None. Cosines and norms are exact on any bases. Raises `AdapterError` if the base models or the
    shapes of a module differ.
    """
    common_shapes((a, b))  # raises if the adapters are not comparable
    rows = tuple(_compare_module(a, b, module, weights) for module in module_order((a, b)))
    return Comparison(rows, _total(rows))


def similarity_matrix(adapters: Sequence[Adapter]) -> NDArray[np.float64]:
    """Return the cosines (n, n) fp64 of the deltas of `adapters` over all modules, on any bases; NaN for a zero delta.

    Each A is drawn once. Raises as `compare`.
    """
    common_shapes(adapters)  # raises if the adapters are not comparable
    inner = np.zeros((len(adapters), len(adapters)))
    for module in module_order(adapters):
        inner += inner_products(adapters, module)
    norms = np.sqrt(inner.diagonal())
    norms[norms == 0.0] = np.nan
    cosines: NDArray[np.float64] = inner / np.outer(norms, norms)
    return cosines.clip(-1.0, 1.0)


def common_entries(a: Adapter, b: Adapter, module: str) -> CommonEntries | None:
    """Return the common entries of two adapters' masks in one module; None if the adapters have different bases."""
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
    positions_a, positions_b = _positions(a, b.shape[1]), _positions(b, a.shape[1])
    both, in_a, in_b = np.intersect1d(positions_a, positions_b, assume_unique=True, return_indices=True)
    signs = a.values[torch.from_numpy(in_a)].sign().double() * b.values[torch.from_numpy(in_b)].sign().double()
    return CommonEntries(
        num_both=len(both),
        num_expected=a.shape[0] * min(a.shape[1], b.shape[1]) * a.density * b.density,
        num_signed=int((signs != 0).sum()),
        num_conflicts=int((signs < 0).sum()),
    )


def _positions(b: SparseB, other_rank: int) -> NDArray[np.int64]:
    """Return positions (K,) of the nonzero entries that are comparable with those of a B of `other_rank`."""
    positions = b.rows * max(b.shape[1], other_rank) + b.indices.long() % b.shape[1]
    return np.asarray(positions.numpy(), np.int64)


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


def _share(part: float, total: float) -> float | None:
    return part / total if total else None


def compare_pairs(
    adapters: Sequence[Adapter], pairs: Sequence[tuple[int, int]], pause: Callable[[], None] = lambda: None
) -> list[ModuleComparison]:
    """Return the total comparison of each of `pairs`, which are indices into `adapters`; `square_sum` is at weights 1 and 1.

    `pause` is called after each module, so that the caller can yield the CPU to other work. Raises as `compare`.
    """
    common_shapes(adapters)  # raises if the adapters are not comparable
    inner = np.zeros((len(adapters), len(adapters)))
    common: list[list[CommonEntries]] = [[] for _ in pairs]
    for module in module_order(adapters):
        inner += inner_products(adapters, module)
        for parts, (i, j) in zip(common, pairs, strict=True):
            if part := common_entries(adapters[i], adapters[j], module):
                parts.append(part)
        pause()
    return [
        ModuleComparison(
            module="",
            num_a=adapters[i].nnz,
            num_b=adapters[j].nnz,
            common=CommonEntries.total(parts) if parts else None,
            square_a=float(inner[i, i]),
            square_b=float(inner[j, j]),
            inner=float(inner[i, j]),
            square_sum=max(0.0, float(inner[i, i] + inner[j, j] + 2 * inner[i, j])),
        )
        for parts, (i, j) in zip(common, pairs, strict=True)
    ]
