"""Comparison of two adapters, against dense fp64 arithmetic."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.compare.pairs import ModuleComparison, compare, inner_products, similarity_matrix
from lori.errors import AdapterError
from lori.sparse import SparseB
from tests.lori.adapters import SHAPES, make_adapter, make_config, make_modules

OTHER = Seeded(seed=5, stream=2)
Q_PROJ = "layers.0.q_proj"
EXPLICIT = Explicit.from_tensors({name: torch.full((2, n), 0.3) + torch.eye(2, n) for name, (_, n) in SHAPES.items()})


def patterned() -> Adapter:
    """Return an adapter with one module of another alpha and another rank, which is larger than its number of inputs."""
    modules = make_modules(seed=11) | make_modules({Q_PROJ: SHAPES[Q_PROJ]}, rank=7, seed=12)
    config = make_config().model_copy(update={"rank_pattern": {Q_PROJ: 7}, "alpha_pattern": {Q_PROJ: 2.0}})
    return replace(make_adapter("patterned"), config=config, modules=modules)


A = make_adapter("a")
OTHERS = {
    "same shape": make_adapter("b", seed=1),
    "larger rank": make_adapter("b", rank=8, seed=2),
    "smaller rank": make_adapter("b", rank=2, alpha=1.0, seed=3),
    "patterns": patterned(),
    "other targets": make_adapter("b", targets=("up_proj", "o_proj"), seed=4),
    "no common module": make_adapter("b", targets=("o_proj",), seed=5),
    "other basis": make_adapter("b", basis=OTHER, seed=6),
    "other basis and rank": make_adapter("b", basis=OTHER, rank=6, targets=("up_proj", "o_proj"), seed=7),
    "explicit basis of fewer rows": replace(make_adapter("b", seed=8), basis=EXPLICIT),
}
ON_ONE_BASIS = {name: b for name, b in OTHERS.items() if b.basis == A.basis}


def delta(adapter: Adapter, module: str) -> torch.Tensor:
    """Return (alpha / r) B A (D, N) fp64 of a module of `SHAPES`; zero if the adapter lacks the module."""
    if (b := adapter.modules.get(module)) is None:
        return torch.zeros(SHAPES[module], dtype=torch.float64)
    alpha = adapter.config.alpha_pattern.get(module, adapter.config.lora_alpha)
    return alpha / b.shape[1] * b.dense(torch.float64) @ adapter.basis.draw(module, b.shape[1], SHAPES[module][1]).double()


def whole(adapter: Adapter) -> torch.Tensor:
    return torch.cat([delta(adapter, module).flatten() for module in SHAPES])


def changed(adapter: Adapter, factor: float) -> Adapter:
    """Return `adapter` with every value multiplied by `factor`."""
    return replace(adapter, modules={m: SparseB(b.shape, b.indices, factor * b.values) for m, b in adapter.modules.items()})


def on_entries(indices: Sequence[int], values: Sequence[float], rank: int = 3) -> Adapter:
    """Return an adapter on one module with these entries."""
    b = SparseB((9, rank), torch.tensor(indices, dtype=torch.int32), torch.tensor(values))
    return replace(make_adapter("entries", rank=rank), modules={Q_PROJ: b})


def check_deltas(row: ModuleComparison, a: torch.Tensor, b: torch.Tensor, weights: tuple[float, float]) -> None:
    assert row.norm_a == pytest.approx(float(a.norm()), rel=1e-10)
    assert row.norm_b == pytest.approx(float(b.norm()), rel=1e-10)
    assert row.norm_sum == pytest.approx(float((weights[0] * a + weights[1] * b).norm()), rel=1e-10)
    assert row.inner == pytest.approx(float((a * b).sum()), rel=1e-10, abs=1e-12)
    if a.any() and b.any():
        assert row.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-10, abs=1e-12)
    else:
        assert row.cosine is None


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -2.0)])
@pytest.mark.parametrize("b", OTHERS.values(), ids=OTHERS)
def test_norms_and_cosine_are_those_of_the_dense_deltas(b: Adapter, weights: tuple[float, float]) -> None:
    comparison = compare(A, b, weights)
    assert {row.module for row in comparison.modules} == A.modules.keys() | b.modules.keys()
    for row in comparison.modules:
        check_deltas(row, delta(A, row.module), delta(b, row.module), weights)
    check_deltas(comparison.total, whole(A), whole(b), weights)


@pytest.mark.parametrize("b", ON_ONE_BASIS.values(), ids=ON_ONE_BASIS)
def test_overlap_and_conflict_are_those_of_the_masks(b: Adapter) -> None:
    comparison = compare(A, b)
    num_both = num_conflicts = 0
    expected = 0.0
    for row in comparison.modules:
        assert row.num_a == (A.modules[row.module].values.numel() if row.module in A.modules else 0)
        assert row.num_b == (b.modules[row.module].values.numel() if row.module in b.modules else 0)
        if row.module not in A.modules or row.module not in b.modules:
            assert (row.num_both, row.overlap, row.chance_overlap, row.sign_conflict) == (0, None, None, None)
            continue
        one, two = A.modules[row.module], b.modules[row.module]
        columns = min(one.shape[1], two.shape[1])
        both = one.mask[:, :columns] & two.mask[:, :columns]
        conflicts = both & (one.dense()[:, :columns] * two.dense()[:, :columns] < 0)
        by_chance = one.shape[0] * columns * one.density * two.density
        assert row.num_both == both.sum()
        assert row.overlap == pytest.approx(int(both.sum()) / min(row.num_a, row.num_b))
        assert row.chance_overlap == pytest.approx(by_chance / min(row.num_a, row.num_b))
        assert row.sign_conflict == pytest.approx(int(conflicts.sum()) / int(both.sum()))
        num_both += int(both.sum())
        num_conflicts += int(conflicts.sum())
        expected += by_chance
    in_all = comparison.total
    assert (in_all.num_a, in_all.num_b, in_all.num_both) == (A.nnz, b.nnz, num_both)
    assert in_all.overlap == pytest.approx(num_both / min(A.nnz, b.nnz))
    assert in_all.chance_overlap == pytest.approx(expected / min(A.nnz, b.nnz))
    assert in_all.sign_conflict == (pytest.approx(num_conflicts / num_both) if num_both else None)


def test_random_masks_overlap_as_expected_by_chance() -> None:
    shapes = {"layers.0.q_proj": (400, 50), "layers.0.up_proj": (300, 40)}
    total = compare(make_adapter("a", shapes, rank=16, seed=1), make_adapter("b", shapes, rank=32, seed=2)).total
    assert total.overlap is not None
    assert total.overlap == pytest.approx(total.chance_overlap, abs=0.03)
    assert total.chance_overlap == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(("factor", "cosine", "conflict"), [(1.0, 1.0, 0.0), (3.0, 1.0, 0.0), (-1.0, -1.0, 1.0)])
def test_a_multiple_has_the_same_mask_and_direction(factor: float, cosine: float, conflict: float) -> None:
    for row in (*(comparison := compare(A, changed(A, factor))).modules, comparison.total):
        assert row.overlap == 1.0
        assert row.sign_conflict == conflict
        assert row.cosine == pytest.approx(cosine, abs=1e-12)
        assert row.norm_sum == pytest.approx(abs(1 + factor) * row.norm_a, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_deltas_that_cancel_have_a_sum_of_norm_zero(seed: int) -> None:
    """The square of the norm may round below zero."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(-(2**22), 2**22, (2, 5), generator=g) / 2.0**23  # x + y is exact
    basis = Explicit.from_tensors({Q_PROJ: torch.stack([x, y, -(x + y)])})
    values = torch.randn(9, generator=g)
    a = on_entries([i for i in range(27) if i % 3 < 2], values.repeat_interleave(2).tolist())
    b = on_entries(range(2, 27, 3), values.tolist())
    total = compare(replace(a, basis=basis), replace(b, basis=basis)).total
    assert total.cosine == pytest.approx(-1.0)
    assert total.norm_sum == pytest.approx(0.0, abs=1e-6)


def test_disjoint_masks_have_no_conflict_but_a_cosine() -> None:
    total = compare(on_entries([0, 4], [1.0, 2.0]), on_entries([1, 3, 8], [1.0, 1.0, 1.0])).total
    assert (total.num_both, total.overlap, total.sign_conflict) == (0, 0.0, None)
    assert total.chance_overlap == pytest.approx(2 / 27 * 3 / 27 * 27 / 2)
    assert total.cosine != 0.0


def test_a_stored_zero_overlaps_but_has_no_sign() -> None:
    total = compare(on_entries([0, 4, 5], [0.0, 2.0, -1.0]), on_entries([0, 4, 5], [1.0, -1.0, -1.0])).total
    assert (total.num_both, total.overlap, total.sign_conflict) == (3, 1.0, 0.5)


def test_entries_of_different_ranks_are_matched_by_row_and_column() -> None:
    # Rank 3: (1, 0) and (1, 2). Rank 4: (0, 3), whose column rank 3 lacks, and (1, 2).
    total = compare(on_entries([3, 5], [1.0, 1.0]), on_entries([3, 6], [1.0, -1.0], rank=4)).total
    assert (total.num_both, total.overlap, total.sign_conflict) == (1, 0.5, 1.0)


@pytest.mark.parametrize("name", [name for name, b in OTHERS.items() if b.basis != A.basis])
def test_on_two_bases_entries_are_not_compared(name: str) -> None:
    comparison = compare(A, OTHERS[name])
    for row in (*comparison.modules, comparison.total):
        assert (row.num_both, row.overlap, row.chance_overlap, row.sign_conflict) == (None, None, None, None)
    assert comparison.total.cosine is not None


def test_an_explicit_copy_of_a_drawn_basis_gives_the_same_delta() -> None:
    copy = Explicit.from_tensors({module: A.basis.draw(module, 3, SHAPES[module][1]) for module in A.modules})
    total = compare(A, replace(A, basis=copy)).total
    assert total.cosine == pytest.approx(1.0, abs=1e-12)
    assert total.overlap is None


def test_comparing_is_symmetric() -> None:
    b = OTHERS["larger rank"]
    there, back = compare(A, b).total, compare(b, A).total
    assert (there.num_a, there.num_b, there.overlap) == (back.num_b, back.num_a, back.overlap)
    assert there.norm_a == pytest.approx(back.norm_b)
    assert there.cosine == pytest.approx(back.cosine, abs=1e-14)


def test_an_empty_adapter_has_no_cosine_and_no_overlap() -> None:
    total = compare(A, on_entries([], [])).total
    assert (total.cosine, total.overlap, total.norm_b) == (None, None, 0.0)
    assert total.norm_sum == pytest.approx(total.norm_a)


def on_another_base() -> Adapter:
    return replace(A, name="stranger", config=make_config(base_digest="c" * 64))


def test_adapters_of_two_base_models_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"stranger. is of a/base .cccccccccccc., expected a/base .b"):
        compare(A, on_another_base())
    with pytest.raises(AdapterError, match="stranger"):
        similarity_matrix([A, A, on_another_base()])


def test_modules_of_two_shapes_are_refused() -> None:
    misshapen = make_adapter("misshapen", {Q_PROJ: (9, 6)})
    with pytest.raises(AdapterError, match=r"of layers.0.q_proj are \(9, 6\) in 'misshapen', expected \(9, 5\)"):
        compare(A, misshapen)


def test_the_matrix_holds_every_pairs_cosine() -> None:
    adapters = [A, *OTHERS.values(), on_entries([], [])]
    matrix = similarity_matrix(adapters)
    assert matrix.shape == (len(adapters), len(adapters))
    assert matrix.dtype == np.float64
    assert np.isnan(matrix[-1]).all()
    assert np.isnan(matrix[:, -1]).all()
    deltas = torch.stack([whole(adapter) for adapter in adapters[:-1]])
    unit = deltas / deltas.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(matrix[:-1, :-1], (unit @ unit.T).numpy(), rtol=0, atol=1e-12)
    assert (matrix[:-1, :-1] == matrix[:-1, :-1].T).all()


def test_inner_products_of_a_module_that_no_adapter_has_are_zero() -> None:
    assert not inner_products([A, OTHERS["same shape"]], "layers.0.o_proj").any()


def test_each_basis_draws_its_a_once_a_module() -> None:
    drawn = []

    class Counting(Seeded):
        def draw(self, module: str, rank: int, num_inputs: int) -> torch.Tensor:
            drawn.append((module, rank))
            return super().draw(module, rank, num_inputs)

    basis = Counting(seed=5, stream=1)
    similarity_matrix([replace(make_adapter("x", rank=rank, seed=rank), basis=basis) for rank in (3, 2, 5, 3)])
    assert sorted(drawn) == [(module, 5) for module in sorted(A.modules)]
