"""Adapters of plain shapes for merges, and the deltas and bits of a merge."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lori.adapter import Adapter
from lori.basis import Basis, Explicit, Seeded
from lori.config import new_config
from lori.format import seal
from lori.identity import BaseIdentity
from lori.merge import MergeMethod, SignMethod, merge
from lori.merge_options import MERGE_METHODS
from lori.sparse import SparseB, ValueType
from lori.template import Template

SHAPES = {"layers.0.q_proj": (9, 5), "layers.0.up_proj": (16, 7), "layers.1.q_proj": (9, 5), "layers.1.up_proj": (16, 7)}
Q0, UP0, Q1, UP1 = SHAPES
ONE, OTHER = Seeded(5, 0), Seeded(5, 1)
OWN = Explicit.from_tensors({module: torch.full((3, shape[1]), 0.1) for module, shape in SHAPES.items()})
Terms = list[tuple[Adapter, float]]
PRUNING: list[MergeMethod] = [method for method in MERGE_METHODS if method != "linear"]
SIGNS: list[SignMethod] = ["total", "frequency"]


def random_b(shape: tuple[int, int], nnz: int, seed: int) -> SparseB:
    """Return a B (D, R) with `nnz` entries."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=g)[:nnz]] = True
    return SparseB.from_dense(torch.randn(shape, generator=g), mask.view(shape))


def adapter_of(
    name: str,
    modules: Mapping[str, SparseB],
    alpha: float = 6.0,
    alpha_pattern: Mapping[str, float] | None = None,
    basis: Basis = ONE,
    base: str = "b",
    templates: Sequence[Template] = ("chat",),
    values: ValueType = "float32",
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
) -> Adapter:
    """Return a sealed adapter."""
    config = new_config(
        modules,
        basis,
        BaseIdentity(f"a/{base}", base * 64, shapes),
        alphas=dict.fromkeys(modules, alpha) | {m: own for m, own in (alpha_pattern or {}).items() if m in modules},
        target_modules=list(modules),
        values=values,
        templates=templates,
        training={},
    )
    return seal(Adapter(name, config, modules, basis)).adapter


def adapter(name: str, rank: int = 3, modules: Sequence[str] = tuple(SHAPES), seed: int | None = None, **more: Any) -> Adapter:
    """Return a random adapter with 13 entries in every module. Another name gives another B."""
    seed = sum(name.encode()) if seed is None else seed
    return adapter_of(name, {m: random_b((SHAPES[m][0], rank), 13, 10 * seed + i) for i, m in enumerate(modules)}, **more)


def mixed_ranks(name: str, ranks: Mapping[str, int], alphas: Mapping[str, float], **more: Any) -> Adapter:
    modules = {module: random_b((SHAPES[module][0], rank), 11, 7 * rank) for module, rank in ranks.items()}
    return adapter_of(name, modules, alpha_pattern=alphas, **more)


def delta(adapter: Adapter, module: str) -> torch.Tensor:
    """Return the delta of `adapter` to the weight of `module`, (alpha / r) B A, (D, N) fp64."""
    shape = adapter.config.shape_of(module)
    assert shape is not None
    if module not in adapter.modules:
        return torch.zeros(shape, dtype=torch.float64)
    a = adapter.basis.draw(module, adapter.config.rank_of(module), shape[1]).double()
    return adapter.config.scale_of(module) * adapter.modules[module].dense(torch.float64) @ a


def merged(terms: Terms, method: MergeMethod = "linear", **options: Any) -> Adapter:
    return merge([adapter for adapter, _ in terms], [weight for _, weight in terms], method, **options)


ON_ONE_BASIS: dict[str, Terms] = {
    "one at a weight": [(adapter("a"), 0.37)],
    "two": [(adapter("a"), 1.0), (adapter("b"), 1.0)],
    "negative weights": [(adapter("a"), 0.7), (adapter("b"), -1.3), (adapter("c"), -0.2)],
    "three ranks": [(adapter("a", 3), 0.7), (adapter("b", 5), 0.5), (adapter("c", 8), -1.1)],
    "three ranks, one scale": [(adapter("a", 3), 0.7), (adapter("b", 5, alpha=10), 0.5), (adapter("c", 8, alpha=16), -1.1)],
    "targets that overlap": [(adapter("a", 3, [Q0, UP0]), 0.7), (adapter("b", 5, [UP0, UP1]), 0.5)],
    "targets that do not": [(adapter("a", 3, [Q0, Q1]), 0.7), (adapter("b", 3, [UP0], alpha=1.5), 0.5)],
    "patterns": [
        (mixed_ranks("a", {Q0: 2, UP0: 4, Q1: 4}, {Q0: 1.5, UP0: 8.0}), 0.7),
        (mixed_ranks("b", {Q0: 6, UP0: 2, UP1: 5}, {UP1: 0.25}), -0.4),
    ],
    "an explicit basis": [(adapter("a", basis=OWN), 0.7), (adapter("b", 2, basis=OWN), 0.5)],
    "an explicit basis of a lower rank": [(adapter("a", 5, basis=OWN), 0.7), (adapter("b", basis=OWN), 0.5)],
}
ON_SEVERAL: dict[str, Terms] = {
    "two": [(adapter("a", basis=ONE), 0.7), (adapter("b", basis=OTHER), 0.5)],
    "two, one scale": [(adapter("a", 3, basis=ONE), 1.0), (adapter("b", 3, basis=OTHER), 1.0)],
    "a seeded and an explicit one": [(adapter("a", 4, basis=ONE), 0.7), (adapter("b", 3, basis=OWN), -0.5)],
    "two on one of three": [
        (adapter("a", 3, basis=ONE), 0.7),
        (adapter("b", 5, basis=OTHER), -0.5),
        (adapter("c", 8, basis=ONE, alpha=1.0), 0.3),
        (adapter("d", 2, basis=OWN), 1.1),
    ],
    "targets that do not overlap": [(adapter("a", 3, [Q0], basis=ONE), 0.7), (adapter("b", 5, [UP0, Q1], basis=OTHER), 0.5)],
    "patterns": [
        (mixed_ranks("a", {Q0: 2, UP0: 4, Q1: 4}, {Q0: 1.5, UP0: 8.0}, basis=ONE), 0.7),
        (mixed_ranks("b", {Q0: 6, UP0: 2, UP1: 5}, {UP1: 0.25}, basis=OTHER), -0.4),
    ],
}
ADAPTERS = [adapter("a", 3), adapter("b", 5), adapter("c", 3, [Q0, UP1], alpha=1.0), adapter("d", 2)]
WEIGHT_SETS = [(1.0, 1.0, 1.0), (0.7, 0.5, -0.4), (2.0, -1.0, 0.0625)]
