"""Adapters in the slots of a served model, and the model's logits with them."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lori.adapter import Adapter
from lori.base_identity import module_shapes
from lori.basis import Seeded
from lori.errors import AdapterError
from lori.kernels.layout import MAX_RANK
from lori.merge import merge
from lori.packed_adapter import pack_adapter
from lori.pool import AdapterPool
from server.engine.model.runner import Runner
from server.engine.request import Chunk, Request
from server.engine.request import Sequence as EngineSequence
from tests.lori.adapters import fold, make_adapter
from tests.lori.served import Served

IDS = torch.tensor([[5, 99, 17, 3, 201, 64, 64, 8]])
TERMS = [("wide", 0, 8, 1.0), ("narrow", 2, 5, -0.5), ("shared", 2, 8, 0.7)]
WEIGHTS = {"wide": 1.0, "narrow": -0.5, "shared": 0.7}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    """Return the tiny model. Tests must not change it."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def adapters(model: PreTrainedModel) -> list[Adapter]:
    """Return three adapters: two on one basis with different ranks and targets, one on another stream."""
    shapes = module_shapes(model)
    return [
        make_adapter("wide", shapes, ("q_proj", "v_proj", "down_proj"), 8, 16.0, Seeded(seed=3), seed=1),
        make_adapter("narrow", shapes, ("q_proj", "up_proj"), 3, 4.5, Seeded(seed=3, stream=7), seed=2),
        make_adapter("shared", shapes, ("down_proj", "o_proj"), 5, 5.0, Seeded(seed=3), seed=3),
    ]


def pool_of(model: PreTrainedModel, adapters: Sequence[Adapter], dtype: torch.dtype = torch.float32) -> AdapterPool:
    """Return a pool of four slots, of which the first ones are filled with `adapters`."""
    bases = list(dict.fromkeys(adapter.basis for adapter in adapters))
    pool = AdapterPool(module_shapes(model), bases, 8 if adapters else 0, 4, dtype)
    for slot, adapter in enumerate(adapters):
        pool.put(slot, pack_adapter(adapter, pool.layouts))
    return pool


def runner_of(model: PreTrainedModel, pool: AdapterPool) -> Runner:
    return Runner(deepcopy(model), pool, num_blocks=1, block_size=16)


def logits(runner: Runner, terms: Sequence[tuple[int, float]] = ()) -> torch.Tensor:
    """Return the logits (T, V) of IDS with the slots and weights of `terms`."""
    ids = tuple(IDS[0].tolist())
    request = Request(id="x", prompt_text="", prompt_ids=ids, prompt_offsets=(0,) * len(ids), max_tokens=0)
    sequence = EngineSequence(request, blocks=[0])
    sequence.terms = [*terms]
    return runner.forward([Chunk(sequence, 0, len(ids))], range(len(ids)))


def folded(model: PreTrainedModel, weighted: list[tuple[Adapter, float]]) -> PreTrainedModel:
    """Return a copy of `model` in fp64 with weighted deltas in its weights."""
    copy = deepcopy(model).double()
    for adapter, weight in weighted:
        for name in adapter.modules:
            linear = copy.get_submodule(name)
            linear.weight += weight * fold(adapter, name, linear.in_features)
    return copy


@torch.inference_mode()
def test_logits_are_those_of_a_folded_model(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    expected = folded(model, [(adapter, WEIGHTS[adapter.name]) for adapter in adapters])(IDS).logits[0]
    runner = runner_of(model, pool_of(model, adapters))
    got = logits(runner, [(slot, WEIGHTS[adapter.name] * adapter.config.scale) for slot, adapter in enumerate(adapters)])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert (got - model(IDS).logits[0]).abs().max() > 0.1  # or the adapters would not matter


@torch.inference_mode()
def test_each_token_has_its_own_adapters(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    served = Served(deepcopy(model), adapters)
    served.apply(TERMS, IDS.numel())
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
    torch.testing.assert_close(served.model.get_submodule(name)(x)[0].double(), expected, rtol=1e-5, atol=1e-4)


def test_without_terms_the_model_is_the_base_bit_for_bit(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    base = logits(runner_of(model, pool_of(model, [])))
    assert torch.equal(logits(runner_of(model, pool_of(model, adapters))), base)
    with torch.inference_mode():
        torch.testing.assert_close(base, model(IDS).logits[0], rtol=1e-5, atol=1e-5)
        served = Served(deepcopy(model), adapters)
        assert torch.equal(served.logits(IDS), model(IDS).logits)


def test_a_slot_that_is_cleared_and_filled_again_changes_no_other(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    pool = pool_of(model, adapters)
    runner = runner_of(model, pool)
    alone = [logits(runner, [(slot, 1.0)]) for slot in range(3)]
    base = logits(runner)
    assert len({values.sum().item() for values in (base, *alone)}) == 4
    pool.clear(1)
    assert torch.equal(logits(runner, [(0, 1.0)]), alone[0])
    torch.testing.assert_close(logits(runner, [(1, 1.0)]), base, rtol=1e-5, atol=1e-5)
    pool.put(1, pack_adapter(adapters[2], pool.layouts))
    assert torch.equal(logits(runner, [(1, 1.0)]), alone[2])
    pool.clear(2)
    assert torch.equal(logits(runner, [(1, 1.0)]), alone[2])
    pool.put(3, pack_adapter(adapters[1], pool.layouts))
    assert torch.equal(logits(runner, [(3, 1.0)]), alone[1])
    assert torch.equal(logits(runner, [(0, 1.0)]), alone[0])


def test_only_layers_that_can_take_a_delta_have_operands(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    pool = pool_of(model, adapters)
    assert pool.layouts.keys() == module_shapes(model).keys()
    assert pool.operands_of(["lm_head", "model.embed_tokens"]) == []
    assert pool.blocks(["lm_head"]) == []


def test_adapters_on_one_basis_share_its_rows(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    blocks = pool_of(model, adapters).blocks([f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")])
    # Three adapters take two bases of the largest rank in each layer.
    assert [[tuple(a.shape) for a in of_layer] for of_layer in blocks] == [[(8, 48)] * 2] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_num_bytes_is_what_the_operands_hold(model: PreTrainedModel, adapters: list[Adapter], dtype: torch.dtype) -> None:
    pool = pool_of(model, adapters, dtype)
    operands = pool.operands_of([*module_shapes(model)])
    tensors = [value for o in operands for value in vars(o).values() if isinstance(value, torch.Tensor)]
    assert pool.num_bytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors) > 0


def test_a_pool_without_adapters_takes_nothing(model: PreTrainedModel) -> None:
    pool = pool_of(model, [])
    assert pool.num_bytes == 0
    assert pool.layouts == {}
    assert pool.operands_of([*module_shapes(model)]) == pool.blocks([*module_shapes(model)]) == []


def test_weight_0_is_the_base(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    nothing = merge(adapters[::2], [0.0, 0.0], name="nothing")  # on one basis
    expected = logits(runner_of(model, pool_of(model, [])))
    for chosen, weight in ((adapters, 0.0), ([nothing], 1.0)):
        got = logits(runner_of(model, pool_of(model, chosen)), [(0, weight)])
        assert torch.equal(got, expected)


def test_an_unprepared_basis_or_rank_is_refused(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    pool = pool_of(model, adapters[::2])
    with pytest.raises(ValueError, match=r"on a basis .* that nothing was prepared for"):
        pool.put(3, pack_adapter(adapters[1], pool.layouts))
    with pytest.raises(AdapterError, match="does not fit what is served"):
        pack_adapter(make_adapter("high", module_shapes(model), ("q_proj",), 9), pool.layouts)
    with pytest.raises(AdapterError, match=f"expected at most {MAX_RANK}"):
        AdapterPool(module_shapes(model), [Seeded()], MAX_RANK + 1, 4, torch.float32)


def test_reserving_room_changes_no_logits(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    pool = pool_of(model, adapters)
    runner = runner_of(model, pool)
    before = logits(runner, [(0, 1.0)])
    pool.reserve(2**20)
    assert pool.num_bytes > 2**19
    assert torch.equal(logits(runner, [(0, 1.0)]), before)


def test_a_pool_counts_its_moves(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    """CUDA graphs hold the addresses of the pool, so the server must notice a move."""
    served = Served(deepcopy(model), adapters)
    pool, packed = served.pool, pack_adapter(adapters[0], served.pool.layouts)

    def addresses() -> list[int]:
        return [operands.pool.data_ptr() for operands in pool._operands.values()]

    before, num_moves = addresses(), pool.num_moves
    pool.clear(0)
    pool.put(0, packed)
    assert (addresses(), pool.num_moves) == (before, num_moves), "the pool moved although there was room"
    pool.reserve(2**20)
    assert pool.num_moves > num_moves
    assert addresses() != before
    assert pool.has_operands
    assert not AdapterPool({}, [], 0, 1, torch.float32).has_operands


def test_weights_in_blocks_are_those_of_the_layers_that_the_adapter_changes() -> None:
    layers = [f"model.layers.{number}.mlp.up_proj" for number in range(12)]
    shapes = dict.fromkeys(layers, (16, 16))
    pool = AdapterPool(shapes, [Seeded()], 4, 2, torch.float32)

    def put(*numbers: int) -> None:
        changed = {layers[number]: shapes[layers[number]] for number in numbers}
        pool.put(1, pack_adapter(make_adapter("some", changed, ("up_proj",), 4, 4.0, Seeded(), seed=1), pool.layouts))

    put(1, 2, 10)
    assert pool.layer_weights(1, [2.0, 3.0]) == (0.0, 2.0, 2.0, *[0.0] * 7, 3.0, 0.0)
    assert pool.layer_weights(1, [2.0, 3.0, 4.0]) == (0.0, 2.0, 3.0, *[0.0] * 7, 4.0, 0.0)
    put(*range(12))
    assert pool.layer_weights(1, [2.0, 3.0]) == (*[2.0] * 6, *[3.0] * 6)
    assert pool.layer_weights(1, [float(block) for block in range(128)])[-1] == 117.0
    pool.clear(1)
    put(0)
    assert pool.layer_weights(1, [2.0, 3.0]) == (2.0, *[0.0] * 11)
