"""Adapters in the layers of a model, and what the model then computes."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lori.adapter import Adapter
from lori.basis import Seeded
from lori.kernels import Route, Term
from lori.layer import LoriLinear, module_shapes
from lori.merge import merge
from lori.pool import AdapterPool
from tests.lori.adapters import fold, make_adapter

IDS = torch.tensor([[5, 99, 17, 3, 201, 64, 64, 8]])
TERMS = [("wide", 0, 8, 1.0), ("narrow", 2, 5, -0.5), ("shared", 2, 8, 0.7)]  # adapter, first token, last, weight


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    """The tiny model, not to be changed."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def adapters(model: PreTrainedModel) -> list[Adapter]:
    """Three adapters: two on one basis with different ranks and targets, one on another stream."""
    shapes = module_shapes(model)
    return [
        make_adapter("wide", shapes, ("q_proj", "v_proj", "down_proj"), 8, 16.0, Seeded(seed=3), seed=1),
        make_adapter("narrow", shapes, ("q_proj", "up_proj"), 3, 4.5, Seeded(seed=3, stream=7), seed=2),
        make_adapter("shared", shapes, ("down_proj", "o_proj"), 5, 5.0, Seeded(seed=3), seed=3),
    ]


SCALES = {"wide": 2.0, "narrow": 1.5, "shared": 1.0}
"""alpha / r of each."""


def route(pool: AdapterPool, terms: list[tuple[str, int, int, float]]) -> Route:
    return Route.of([Term(i, j, pool.slot(name), w * SCALES[name]) for name, i, j, w in terms], IDS.numel())


def folded(model: PreTrainedModel, weighted: list[tuple[Adapter, float]]) -> PreTrainedModel:
    """Returns a copy of `model` in fp64 with weighted deltas in its weights."""
    copy = deepcopy(model).double()
    for adapter, weight in weighted:
        for name in adapter.modules:
            linear = copy.get_submodule(name)
            linear.weight += weight * fold(adapter, name, linear.in_features)
    return copy


@torch.inference_mode()
def test_logits_are_those_of_a_folded_model(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    weights = {"wide": 1.0, "narrow": -0.5, "shared": 0.7}
    expected = folded(model, [(adapter, weights[adapter.name]) for adapter in adapters])(IDS).logits
    served = deepcopy(model)
    pool = AdapterPool(served, adapters)
    pool.active.route = route(pool, [(name, 0, IDS.numel(), weight) for name, weight in weights.items()])
    got = served(IDS).logits
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert (got - model(IDS).logits).abs().max() > 0.1  # or the adapters would not matter


@torch.inference_mode()
def test_each_token_has_its_own_adapters(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    served = deepcopy(model)
    pool = AdapterPool(served, adapters)
    pool.active.route = route(pool, TERMS)
    name = "model.layers.1.mlp.down_proj"  # a target of "wide" and "shared"
    x = torch.randn(1, IDS.numel(), 80, generator=torch.Generator().manual_seed(0))
    plain, by_name = model.get_submodule(name), {adapter.name: adapter for adapter in adapters}
    expected = torch.empty(IDS.numel(), 48, dtype=torch.float64)
    for t in range(IDS.numel()):
        weight = plain.weight.double()
        for adapter, start, stop, factor in TERMS:
            if start <= t < stop and name in by_name[adapter].modules:
                weight = weight + factor * fold(by_name[adapter], name, 80)
        expected[t] = weight @ x[0, t].double()
    torch.testing.assert_close(served.get_submodule(name)(x)[0].double(), expected, rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_without_a_route_the_model_is_the_base_bit_for_bit(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    served = deepcopy(model)
    AdapterPool(served, adapters)
    assert torch.equal(served(IDS).logits, model(IDS).logits)


def test_every_adapter_has_a_slot_of_its_own(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    pool = AdapterPool(deepcopy(model), adapters)
    assert sorted(pool.slot(adapter.name) for adapter in adapters) == [0, 1, 2]
    with pytest.raises(KeyError):
        pool.slot("unknown")


def test_only_layers_that_some_adapter_targets_are_replaced(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    served = deepcopy(model)
    AdapterPool(served, adapters)
    replaced = {name for name, module in served.named_modules() if isinstance(module, LoriLinear)}
    assert replaced == {name for adapter in adapters for name in adapter.modules}
    assert not any(name.endswith(("k_proj", "gate_proj", "lm_head")) for name in replaced)


def test_adapters_on_one_basis_share_its_rows(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    served = deepcopy(model)
    AdapterPool(served, adapters)
    layer = served.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, LoriLinear)
    # q_proj and v_proj share x: their rows of W, then two bases of the largest rank for each.
    assert layer.product is served.get_submodule("model.layers.0.self_attn.v_proj").product
    assert layer.product.weight.shape == (64 + 32 + 2 * (2 * 8), 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_num_bytes_is_what_the_operands_hold(model: PreTrainedModel, adapters: list[Adapter], dtype: torch.dtype) -> None:
    served = deepcopy(model).to(dtype)
    pool = AdapterPool(served, adapters)
    operands = [module.operands for module in served.modules() if isinstance(module, LoriLinear)]
    tensors = [value for o in operands for value in vars(o).values() if isinstance(value, torch.Tensor)]
    assert pool.num_bytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors) > 0


@torch.inference_mode()
def test_a_pool_without_adapters_leaves_the_model_alone(model: PreTrainedModel) -> None:
    served = deepcopy(model)
    pool = AdapterPool(served, [])
    assert pool.num_bytes == 0
    assert all(type(module) is nn.Linear for name, module in served.named_modules() if name.endswith("_proj"))
    assert torch.equal(served(IDS).logits, model(IDS).logits)


@torch.inference_mode()
def test_weight_0_is_the_base_bit_for_bit(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    expected = model(IDS).logits
    nothing = merge(adapters[::2], [0.0, 0.0], name="nothing")  # on one basis
    for chosen, name in ((adapters, "wide"), ([nothing], "nothing")):
        served = deepcopy(model)
        pool = AdapterPool(served, chosen)
        weight = 0.0 if name == "wide" else 1.0
        pool.active.route = Route.of([Term(0, IDS.numel(), pool.slot(name), weight)], IDS.numel())
        assert torch.equal(served(IDS).logits, expected)
