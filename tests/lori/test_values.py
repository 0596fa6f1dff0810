"""Rounding of B for the disk."""

import math

import pytest
import torch

from lori.sparse import VALUE_TYPES, SparseB, ValueType, dequantize, quantize, rounded, rounding_error


def random_b(seed: int = 0, num_outputs: int = 200, rank: int = 16, density: float = 0.1) -> SparseB:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(num_outputs, rank, generator=g) * torch.rand(num_outputs, 1, generator=g).pow(4)
    return SparseB.from_dense(dense, torch.rand(num_outputs, rank, generator=g) < density)


@pytest.mark.parametrize("value_type", VALUE_TYPES)
@pytest.mark.parametrize("seed", range(5))
def test_rounding_twice_changes_nothing(value_type: ValueType, seed: int) -> None:
    once = rounded(random_b(seed), value_type)
    twice = rounded(once, value_type)
    assert torch.equal(once.values, twice.values)
    assert once.values.dtype == twice.values.dtype


@pytest.mark.parametrize(("value_type", "bound"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 0.0)])
def test_floats_are_rounded_to_the_nearest(value_type: ValueType, bound: float) -> None:
    b = random_b()
    torch.testing.assert_close(rounded(b, value_type).values.float(), b.values, rtol=bound * 1.0001, atol=1e-7)


def test_int8_is_within_half_a_step_of_its_row() -> None:
    b = random_b(density=0.5)
    quantized, scales = quantize(b)
    assert quantized.dtype == torch.int8
    assert scales.dtype == torch.bfloat16
    steps = scales.float()[b.rows]
    assert ((dequantize(quantized, scales, b.rows.numpy()) - b.values).abs() <= 0.5001 * steps).all()
    for row in b.rows.unique():
        own = b.rows == row
        assert quantized[own].abs().max() == 127
        assert abs(scales[row].item() * 127 / b.values[own].abs().max().item() - 1) <= 2**-8


def test_an_empty_row_and_a_row_of_zeros_have_no_scale() -> None:
    b = SparseB((3, 2), torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0.0, -2.0]))
    quantized, scales = quantize(b)
    assert quantized.tolist() == [0, -127]
    assert scales[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-37, 1e-30, 1e30, 3e38])
def test_extreme_values_stay_finite_and_stable(size: float) -> None:
    b = SparseB((1, 4), torch.arange(4, dtype=torch.int32), torch.tensor([size, -size / 2, size / 7, 0.0]))
    once = rounded(b, "int8")
    assert once.values.isfinite().all()
    assert torch.equal(once.values, rounded(once, "int8").values)


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_the_error_is_relative_over_all_modules(value_type: ValueType) -> None:
    modules = [random_b(1), random_b(2)]
    exact = torch.cat([b.values.double() for b in modules])
    stored = torch.cat([rounded(b, value_type).values.double() for b in modules])
    assert rounding_error(modules, value_type) == pytest.approx(float((stored - exact).norm() / exact.norm()), rel=1e-9)


def test_each_types_error_has_the_expected_magnitude() -> None:
    errors = {value_type: rounding_error([random_b(3, 3000)], value_type) for value_type in VALUE_TYPES}
    assert errors["float32"] == 0
    assert 0 < errors["float16"] < errors["bfloat16"] < 2**-8
    assert 0 < errors["int8"] < 0.01


def test_an_adapter_without_entries_has_no_error() -> None:
    assert rounding_error([], "int8") == 0
    assert not math.isnan(rounding_error([random_b(density=0.0)], "int8"))
