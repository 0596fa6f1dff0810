"""The trainable layers: what is a parameter, and what a phase leaves behind."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lori.base_model import load_base_model
from lori.basis import Seeded
from lori.errors import ModelError
from training.trainable import MaskedDelta, TrainableLinear, wrap


def test_only_the_kept_entries_are_parameters() -> None:
    mask = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) < 0.3
    delta = MaskedDelta(mask)
    assert [p.numel() for p in delta.parameters()] == [int(mask.sum())]
    with torch.no_grad():
        delta.values.copy_(torch.arange(1.0, int(mask.sum()) + 1))
    assert torch.equal(delta.dense() != 0, mask)
    torch.testing.assert_close(delta.dense(), delta.sparse().dense())


def test_a_masked_entry_s_gradient_is_the_dense_one_s() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=True)
    layer = TrainableLinear(linear, torch.randn(3, 6), scale=2.0)
    x = torch.randn(4, 6)
    layer(x).square().sum().backward()
    dense = layer.delta.b.grad
    assert dense is not None
    mask = torch.rand(5, 3) < 0.5
    layer.delta = MaskedDelta(mask)
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.delta.values.grad, dense[mask])


def test_the_layer_adds_scale_b_a_x() -> None:
    torch.manual_seed(0)
    linear, a, b, x = nn.Linear(6, 5), torch.randn(3, 6), torch.randn(5, 3), torch.randn(2, 7, 6)
    layer = TrainableLinear(linear, a, scale=0.5)
    torch.testing.assert_close(layer(x), linear(x))
    with torch.no_grad():
        layer.delta.b.copy_(b)
    torch.testing.assert_close(layer(x), linear(x) + 0.5 * x @ a.T @ b.T)


def test_wrap_says_which_target_is_missing(tiny_model: Path) -> None:
    model = load_base_model(str(tiny_model), torch.float32).model
    with pytest.raises(ModelError, match=r"\['c_attn'\]"):
        wrap(model, ["q_proj", "c_attn"], Seeded(), 4, 8.0)


def test_wrap_leaves_only_deltas_trainable(tiny_model: Path) -> None:
    model = load_base_model(str(tiny_model), torch.float32).model
    layers = wrap(model, ["q_proj", "down_proj"], Seeded(), 4, 8.0)
    assert sorted(layers) == [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.down_proj", "self_attn.q_proj")]
    assert all(name.endswith(".delta.b") for name, p in model.named_parameters() if p.requires_grad)
