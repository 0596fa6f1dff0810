"""Trainable layers: their parameters, outputs and gradients, and the resulting B."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lori.base_model import load_base_model
from lori.basis import Seeded
from lori.errors import ModelError
from lori.sparse import SparseB
from training.trainable import DenseB, MaskedB, TrainableLinear, adapter_disabled, at_adapter_weight, wrap


def random_mask(*shape: int, density: float = 0.3) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


def some_b() -> SparseB:
    return SparseB.from_dense(torch.arange(1.0, 37).view(9, 4), random_mask(9, 4, density=0.5).flip(0))


def test_only_entries_in_the_mask_are_parameters() -> None:
    mask = random_mask(9, 4)
    b = MaskedB(mask)
    assert [p.numel() for p in b.parameters() if p.requires_grad] == [int(mask.sum())]
    with torch.no_grad():
        b.trained.values.copy_(torch.arange(1.0, int(mask.sum()) + 1))
    assert torch.equal(b.scaled(2.0, torch.float32) != 0, mask)
    torch.testing.assert_close(b.scaled(2.0, torch.float32), 2 * b.sparse().dense())


def test_initial_entries_outside_the_mask_stay_and_those_inside_train_on() -> None:
    start, mask = some_b(), random_mask(9, 4)
    b = MaskedB(mask, start)
    torch.testing.assert_close(b.scaled(1.0, torch.float32), start.dense())
    with torch.no_grad():
        b.trained.values.add_(100.0)
    expected = start.dense() + 100 * mask
    torch.testing.assert_close(b.scaled(1.0, torch.float32), expected)
    torch.testing.assert_close(b.sparse().dense(), expected)
    assert torch.equal(b.sparse().mask, mask | start.mask)


def test_a_dense_change_is_on_top_of_its_start() -> None:
    start = some_b()
    b = DenseB(9, 4, start)
    with torch.no_grad():
        b.change.fill_(0.5)
    torch.testing.assert_close(b.scaled(2.0, torch.float32), 2 * (start.dense() + 0.5))
    torch.testing.assert_close(b.sparse().dense(), start.dense() + 0.5)
    assert b.sparse().mask.all()


def test_a_weight_scales_the_delta_inside_its_block_only() -> None:
    layer = TrainableLinear(nn.Linear(6, 5), torch.randn(3, 6), scale=2.0)
    with torch.no_grad():
        layer.b.change.normal_()  # type: ignore[union-attr]  # a DenseB
        x = torch.randn(4, 6)
        full = layer(x)
        with adapter_disabled(layer):
            base = layer(x)
        with at_adapter_weight(layer, 0.25):
            with adapter_disabled(layer):
                torch.testing.assert_close(layer(x), base)
            quarter = layer(x)
        torch.testing.assert_close(quarter - base, 0.25 * (full - base))
        torch.testing.assert_close(layer(x), full)


def test_a_masked_entry_s_gradient_is_the_dense_one_s() -> None:
    torch.manual_seed(0)
    layer = TrainableLinear(nn.Linear(6, 5, bias=True), torch.randn(3, 6), scale=2.0)
    x = torch.randn(4, 6)
    layer(x).square().sum().backward()
    assert isinstance(layer.b, DenseB)
    dense = layer.b.change.grad
    assert dense is not None
    mask = torch.rand(5, 3) < 0.5
    layer.set_b(MaskedB(mask))
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.b.trained.values.grad, dense[mask])


def test_the_layer_adds_scale_b_a_x() -> None:
    torch.manual_seed(0)
    linear, a, b, x = nn.Linear(6, 5), torch.randn(3, 6), torch.randn(5, 3), torch.randn(2, 7, 6)
    expected = linear(x)
    layer = TrainableLinear(linear, a, scale=0.5)
    torch.testing.assert_close(layer(x), expected)
    assert isinstance(layer.b, DenseB)
    with torch.no_grad():
        layer.b.change.copy_(b)
    torch.testing.assert_close(layer(x), expected + 0.5 * x @ a.T @ b.T)


def test_no_tensor_as_wide_as_the_outputs_is_saved_for_the_backward_pass() -> None:
    """Regression: A x was a view of the product with W x and kept it alive: 86 KB a token in each layer of an 8B model."""
    saved_sizes: list[int] = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved_sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    layer = TrainableLinear(nn.Linear(6, 50), torch.randn(3, 6), scale=2.0)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        layer(torch.randn(100, 6))
    assert 100 * 3 in saved_sizes
    assert max(saved_sizes) < 100 * 50


def test_b_is_on_the_device_of_w() -> None:
    """Regression: B stayed on the CPU until Trainer moved it. Trainer does not if the base is sharded, or if no phase is left."""
    layer = TrainableLinear(nn.Linear(6, 5, device="meta"), torch.randn(4, 6), scale=0.5)
    start = SparseB.from_dense(torch.ones(5, 4), random_mask(5, 4))
    for b in (layer.b, DenseB(5, 4, start), MaskedB(random_mask(5, 4, density=0.5), start)):
        layer.set_b(b)
        assert {tensor.device.type for tensor in (*layer.b.parameters(), *layer.b.buffers())} == {"meta"}
        assert layer(torch.empty(2, 6, device="meta")).shape == (2, 5)


def test_wrap_says_which_target_is_missing(tiny_model: Path) -> None:
    model = load_base_model(str(tiny_model), torch.float32).model
    with pytest.raises(ModelError, match=r"\['c_attn'\]"):
        wrap(model, ["q_proj", "c_attn"], Seeded(), 4, 8.0)


def test_wrap_leaves_only_deltas_trainable(tiny_model: Path) -> None:
    model = load_base_model(str(tiny_model), torch.float32).model
    layers = wrap(model, ["q_proj", "down_proj"], Seeded(), 4, 8.0)
    assert sorted(layers) == [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.down_proj", "self_attn.q_proj")]
    assert all(name.endswith(".b.change") for name, p in model.named_parameters() if p.requires_grad)
