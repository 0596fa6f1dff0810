"""Norm and gate beside a layer's products: in C++ and in torch, against sums in fp64."""

from collections.abc import Callable

import pytest
import torch

from server.engine.model.decoder import Norm
from tests.server.engine.model.attended import (
    HEADS,
    NATIVE,
    ROUNDING,
    each_case,
    each_dtype,
    each_implementation,
    make_ops,
    weights,
)

pytestmark = pytest.mark.usefixtures("mended_interpreter", "num_threads")


# --- norm


@each_case("sizes,is_added", [(1, 16), (3, 48), (65, 96), (5, 4096), (130, 576)], [False, True])
def test_norm(sizes: tuple[int, int], is_added: bool, dtype: torch.dtype, implementation: str) -> None:
    num_rows, size = sizes
    g = torch.Generator().manual_seed(size)
    stream = (torch.randn(num_rows, size, generator=g) * torch.logspace(-3, 3, num_rows)[:, None]).to(dtype)
    added = torch.randn(num_rows, size, generator=g).to(dtype) if is_added else None
    norm, before = Norm(weight=weights(size), epsilon=1e-5), stream.clone()
    out = make_ops(implementation, [HEADS], 1, 16, dtype).norm(stream, added, norm)
    assert torch.equal(stream, before if added is None else before + added)  # to the bit, as rounded
    exact = stream.double()
    exact = exact / (exact.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert out.dtype is dtype
    assert ((out.double() - exact).abs() <= (ROUNDING[dtype] + 2e-6) * exact.abs()).all()


@each_implementation
@each_dtype
def test_norm_of_extremes(dtype: torch.dtype, implementation: str) -> None:
    rows = [torch.zeros(32), torch.full((32,), 1e-15), torch.full((32,), 1e15), torch.full((32,), -3.0), torch.ones(32)]
    stream = torch.stack(rows).to(dtype)
    stream[3, 5] = torch.nan
    out = make_ops(implementation, [HEADS], 1, 16, dtype).norm(stream, None, Norm(weight=torch.ones(32), epsilon=1e-6))
    assert out[0].eq(0).all()
    torch.testing.assert_close(out[1], stream[1] * 1000, rtol=1e-2, atol=0)
    torch.testing.assert_close(out[2], torch.ones_like(out[2]), rtol=1e-6, atol=0)
    assert out[3].isnan().all()
    torch.testing.assert_close(out[4], stream[4], rtol=1e-5, atol=0)


# --- gate

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * torch.erfc(-x * 0.5**0.5),
}


@each_case("sizes,activation", [(1, 16), (3, 48), (33, 80), (2, 4096)], list(ACTIVATIONS))
def test_gate(sizes: tuple[int, int], activation: str, dtype: torch.dtype, implementation: str) -> None:
    num_rows, size = sizes
    g = torch.Generator().manual_seed(size)
    x = (torch.randn(num_rows, 2 * size, generator=g) * 3).to(dtype)
    out = make_ops(implementation, [HEADS], 1, 16, dtype).gate(x, activation)
    assert_gated(out, x, activation, implementation)


def assert_gated(out: torch.Tensor, x: torch.Tensor, activation: str, implementation: str) -> None:
    gated, up = x.double().chunk(2, 1)
    exact = ACTIVATIONS[activation](gated) * up
    num_roundings = 1 if implementation in NATIVE else 2  # torch rounds the activation before it is multiplied
    allowed = num_roundings * ROUNDING[x.dtype] * exact.abs() + 1e-6 * (gated * up).abs() + 2.0**-126 * (1 + up.abs())
    excess = (out.double() - exact).abs() - allowed
    assert out.shape == exact.shape
    assert (excess <= 0).all(), f"off by {excess.max().item()} more than allowed"


@each_implementation
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_of_what_is_large_or_small(activation: str, dtype: torch.dtype, implementation: str) -> None:
    sizes = torch.cat([torch.logspace(-37, 38, 151), torch.linspace(60, 120, 121)])
    gated = torch.cat([sizes, -sizes, torch.zeros(16)])
    gated = torch.cat([gated, torch.full((-len(gated) % 16,), -88.0)])
    x = torch.cat([gated, torch.full_like(gated, 0.5)])[None].to(dtype)
    out = make_ops(implementation, [HEADS], 1, 16, dtype).gate(x, activation)
    assert_gated(out, x, activation, implementation)
    least = out[0][x[0, : len(gated)] < -100]
    assert least.abs().max() < 1e-30, "what is far below zero lets nothing pass"


@each_implementation
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_the_gate_in_its_own_column_alone(activation: str, dtype: torch.dtype, implementation: str) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    x[0, 3] = x[1, 32 + 5] = torch.nan
    out = make_ops(implementation, [HEADS], 1, 16, dtype).gate(x, activation)
    assert out.isnan().nonzero().tolist() == [[0, 3], [1, 5]]
