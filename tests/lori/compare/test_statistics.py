"""Statistics of one adapter, against dense fp64 arithmetic."""

import math
from dataclasses import replace

import pytest
import torch

from lori.adapter import Adapter
from lori.basis import Explicit
from lori.compare.statistics import ModuleStatistics, statistics, total
from lori.sparse import SparseB
from tests.lori.adapters import RANK, SHAPES, make_adapter, make_config, make_modules

Q_PROJ = "layers.0.q_proj"


def patterned(seed: int = 0) -> Adapter:
    """Return an adapter with one module of another alpha and another rank, which is larger than its number of inputs."""
    modules = make_modules(seed=seed) | make_modules({Q_PROJ: SHAPES[Q_PROJ]}, rank=7, seed=seed + 1)
    config = make_config().model_copy(update={"rank_pattern": {Q_PROJ: 7}, "alpha_pattern": {Q_PROJ: 2.0}})
    return replace(make_adapter("patterned"), config=config, modules=modules)


def dense_b(adapter: Adapter, module: str) -> torch.Tensor:
    b = adapter.modules[module]
    alpha = adapter.config.alpha_pattern.get(module, adapter.config.lora_alpha)
    return alpha / b.shape[1] * b.dense(torch.float64)


def by_module(adapter: Adapter) -> dict[str, ModuleStatistics]:
    return {row.module: row for row in statistics(adapter)}


def of_one(b: SparseB) -> ModuleStatistics:
    """Return the statistics of an adapter whose only module is `b`, with alpha / r = 2."""
    (row,) = statistics(replace(make_adapter("a"), modules={Q_PROJ: b}))
    return row


@pytest.mark.parametrize("adapter", [make_adapter("a"), make_adapter("b", rank=8, alpha=3.0, seed=4), patterned()])
def test_norms_are_those_of_the_dense_delta(adapter: Adapter) -> None:
    rows = by_module(adapter)
    assert rows.keys() == adapter.modules.keys()
    for module, row in rows.items():
        b = dense_b(adapter, module)
        delta = b @ adapter.basis.draw(module, b.shape[1], SHAPES[module][1]).double()
        assert row.norm_b == pytest.approx(float(b.norm()), rel=1e-12)
        assert row.norm_delta == pytest.approx(float(delta.norm()), rel=1e-12)
        assert row.max_abs == pytest.approx(float(b.abs().max()), rel=1e-12)


@pytest.mark.parametrize("adapter", [make_adapter("a"), patterned()])
def test_counts_are_those_of_the_mask(adapter: Adapter) -> None:
    for module, row in by_module(adapter).items():
        mask = adapter.modules[module].mask
        assert (row.num_rows, row.num_entries) == (mask.shape[0], mask.numel())
        assert row.num_kept == mask.sum()
        assert row.density == pytest.approx(float(mask.double().mean()))
        assert row.num_empty_rows == (~mask.any(1)).sum()
        assert row.empty_rows == pytest.approx(float((~mask.any(1)).double().mean()))


def test_a_stored_zero_counts_as_an_entry() -> None:
    row = of_one(SparseB((9, RANK), torch.tensor([0, 1, 7], dtype=torch.int32), torch.tensor([0.0, 0.0, -1.5])))
    assert (row.num_kept, row.num_empty_rows) == (3, 7)
    assert row.max_abs == row.norm_b == 3.0


def test_the_statistics_of_an_empty_module_are_zero() -> None:
    row = of_one(SparseB((9, RANK), torch.zeros(0, dtype=torch.int32), torch.zeros(0)))
    assert (row.num_kept, row.density, row.empty_rows) == (0, 0.0, 1.0)
    assert (row.max_abs, row.norm_b, row.norm_delta) == (0.0, 0.0, 0.0)


def test_bf16_values_are_measured_in_fp64() -> None:
    values = torch.full((27,), 0.1).bfloat16()
    row = of_one(SparseB((9, RANK), torch.arange(27, dtype=torch.int32), values))
    assert row.norm_b == pytest.approx(2 * math.sqrt(27) * float(values[0]), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_delta_that_cancels_has_the_norm_zero(seed: int) -> None:
    """The square of the norm may round below zero."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(-(2**22), 2**22, (2, 5), generator=g) / 2.0**23  # x + y is exact
    basis = Explicit.from_tensors({Q_PROJ: torch.stack([x, y, -(x + y)])})
    values = torch.randn(9, generator=g).repeat_interleave(3)
    b = SparseB((9, 3), torch.arange(27, dtype=torch.int32), values)
    (row,) = statistics(replace(make_adapter("a"), modules={Q_PROJ: b}, basis=basis))
    assert row.norm_b > 1
    assert row.norm_delta == pytest.approx(0.0, abs=1e-6)


def test_the_total_is_that_of_all_modules() -> None:
    adapter = patterned()
    whole = total(statistics(adapter))
    flat = torch.cat([dense_b(adapter, module).flatten() for module in adapter.modules])
    deltas = [dense_b(adapter, m) @ adapter.basis.draw(m, b.shape[1], SHAPES[m][1]).double() for m, b in adapter.modules.items()]
    masks = [b.mask.any(1) for b in adapter.modules.values()]
    assert whole.module == ""
    assert (whole.num_kept, whole.num_entries) == (adapter.nnz, adapter.num_entries)
    assert whole.density == pytest.approx(adapter.nnz / adapter.num_entries)
    assert whole.empty_rows == pytest.approx(1 - float(torch.cat(masks).double().mean()))
    assert whole.norm_b == pytest.approx(float(flat.norm()), rel=1e-12)
    assert whole.norm_delta == pytest.approx(math.sqrt(sum(float(d.square().sum()) for d in deltas)), rel=1e-12)
    assert whole.max_abs == pytest.approx(float(flat.abs().max()), rel=1e-12)


def test_modules_are_sorted_by_layer_and_then_by_target() -> None:
    shapes = {f"layers.{i}.{name}": (4, 5) for i in (10, 2) for name in ("down_proj", "q_proj")} | {"lm_head": (4, 5)}
    adapter = make_adapter("a", shapes, ("q_proj", "lm_head", "down_proj"))
    expected = ["lm_head", "layers.2.q_proj", "layers.2.down_proj", "layers.10.q_proj", "layers.10.down_proj"]
    assert [row.module for row in statistics(adapter)] == expected


def test_the_statistics_pause_after_each_module() -> None:
    adapter, rests = make_adapter("a"), list[int]()
    assert statistics(adapter, lambda: rests.append(1)) == statistics(adapter)
    assert len(rests) == len(adapter.modules)
