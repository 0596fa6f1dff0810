"""The benchmark of the kernels: it measures, judges and plots. The tests do not check its figures."""

from dataclasses import asdict, replace
from itertools import product as all_of
from pathlib import Path

import pytest
import torch

from lori import native
from tests.bench import product
from tests.bench.kernel import COLUMNS, Plan, Row, cells, verdicts
from tests.bench.kernel_plot import plot
from tests.bench.kernel_steps import POPULARITY, Shape


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Return rows of a step of 32 tokens on a small module, labelled as the modules of the goals."""
    before = torch.get_num_threads()
    shape = Shape("Llama-3-8B", 40, 24)
    plan = Plan([shape], [32], list(POPULARITY), [1, 2], ["hot", "cold"], [1], 0.0)
    measured = list(plan.measure(torch.device("cpu")))
    torch.set_num_threads(before)
    assert len(measured) == plan.size
    return [replace(row, shape=name) for name in ("576x576", "4096x4096") for row in measured]


@pytest.mark.slow
def test_a_row_has_every_figure(rows: list[Row]) -> None:
    assert all(row.base_us > 0 and row.expand_us > 0 and row.dense_us and row.floor_us > 0 for row in rows)
    assert {row.popularity for row in rows} == set(POPULARITY)
    distinct, identical = (next(row.bytes for row in rows if row.popularity == p) for p in ("distinct", "identical"))
    assert distinct > 16 * identical
    assert all(len(cells(row)) == len(COLUMNS) for row in rows)


@pytest.mark.slow
def test_every_goal_is_judged_by_its_own_rows(rows: list[Row]) -> None:
    wide = [replace(row, tokens=64) for row in rows]
    lines = list(verdicts([*rows, *wide]))
    assert len(lines) == 2 * (3 + 4) + 2  # two shapes: three hot, four cold with dense; and the cold floor of each shape
    assert all(line.startswith(("met ", "missed ", "noisy ")) for line in lines)
    quiet = [replace(row, base_us=1e9, expand_low_us=row.expand_us, expand_high_us=row.expand_us) for row in rows]
    assert next(verdicts(quiet)).startswith("met ")
    noisy = [replace(row, expand_low_us=0.0, expand_high_us=9 * row.expand_us) for row in rows]
    assert all(line.startswith("noisy ") for line in verdicts(noisy))


@pytest.mark.slow
def test_the_plot_is_drawn(rows: list[Row], tmp_path: Path) -> None:
    plot([asdict(row) for row in rows], tmp_path / "kernel.png")
    assert (tmp_path / "kernel.png").stat().st_size > 10_000


@pytest.mark.slow
@torch.inference_mode()
def test_products_of_each_set_are_measured() -> None:
    rows = list(product.measure(0.0, (40, 24), 4 * 40 * 24 * 2))
    names = (*native.instruction_sets(), product.TORCH)
    assert [(row.cache, row.num_tokens, row.name) for row in rows] == [*all_of(("hot", "cold"), product.TOKENS, names)]
    assert all(0 < row.low <= row.median <= row.high for row in rows)


def test_a_speed_counts_two_operations_per_weight_and_token() -> None:
    row = product.Row.of_times("amx", "hot", 32, (1536, 576), product.Times(median=100.0, low=80.0, high=160.0))
    assert (row.low, row.median, row.high) == pytest.approx((353.9, 566.2, 707.8), abs=0.1)
