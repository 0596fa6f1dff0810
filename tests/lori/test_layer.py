"""The served linear layer: y = W x + b + sum of weight * scale * B A x.

Shapes: T tokens, N inputs, D outputs, R rank.
"""

import gc
import weakref
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lori.basis import Seeded
from lori.kernels import Operands, Route, Term, add_delta
from lori.layer import ActiveRoute, LoriLinear, attach, fuse, module_shapes
from tests.lori.operands import put, sparse

NUM_OUTPUTS, NUM_INPUTS, RANK = 33, 21, 5
BASES = (Seeded(seed=1), Seeded(seed=1, stream=1))
RANKS_AND_BASES = ((5, 0), (3, 1), (5, 1))  # of three slots
TERMS = (Term(0, 2, 0, 1.5), Term(1, 4, 1, -0.5), Term(1, 2, 2, 2.0), Term(5, 6, 2, 0.25))
NUM_TOKENS = 6


class Rig:
    """A layer, the linear layer that it stands for, and the B of its slots."""

    def __init__(self, bias: bool, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(NUM_INPUTS, NUM_OUTPUTS, bias=bias, dtype=dtype)
        self.active = ActiveRoute()
        operands = Operands(len(RANKS_AND_BASES), RANK, NUM_OUTPUTS, dtype, "cpu")
        self.deltas = [torch.randn(NUM_OUTPUTS, rank).to(dtype) for rank, _ in RANKS_AND_BASES]
        for slot, (b, (_, basis)) in enumerate(zip(self.deltas, RANKS_AND_BASES, strict=True)):
            put(operands, slot, b, basis)
        blocks = [basis.draw("layer", RANK, NUM_INPUTS) for basis in BASES]
        [self.layer] = fuse([self.linear], [blocks], [operands], self.active)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (T, D) fp64 for x (T, N): each token through its own folded weight."""
        y = torch.empty(len(x), NUM_OUTPUTS, dtype=torch.float64)
        for t in range(len(x)):
            weight = self.linear.weight.double()
            for term in TERMS:
                if term.start <= t < term.stop:
                    rank, basis = RANKS_AND_BASES[term.slot]
                    a = BASES[basis].draw("layer", rank, NUM_INPUTS).double()
                    weight = weight + term.weight * self.deltas[term.slot].double() @ a
            y[t] = weight @ x[t].double()
        return y if self.linear.bias is None else y + self.linear.bias.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(NUM_TOKENS,), (1, NUM_TOKENS), (2, 3), (3, 1, 2)])
@torch.inference_mode()
def test_the_deltas_of_the_route_are_added(shape: tuple[int, ...], bias: bool) -> None:
    rig = Rig(bias)
    x = torch.randn(NUM_TOKENS, NUM_INPUTS)
    rig.active.route = Route.of(TERMS, NUM_TOKENS)
    y = rig.layer(x.view(*shape, NUM_INPUTS))
    assert y.shape == (*shape, NUM_OUTPUTS)
    torch.testing.assert_close(y.reshape(NUM_TOKENS, NUM_OUTPUTS).double(), rig.expected(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_bf16_is_as_near_as_its_rounding(bias: bool) -> None:
    rig = Rig(bias, torch.bfloat16)
    x = torch.randn(NUM_TOKENS, NUM_INPUTS).bfloat16()
    rig.active.route = Route.of(TERMS, NUM_TOKENS)
    y = rig.layer(x)
    assert y.dtype == torch.bfloat16
    # A, A x, weight * A x, W x and y are rounded to 2**-9 each, on sums of magnitude about 10.
    torch.testing.assert_close(y.double(), rig.expected(x), rtol=2**-6, atol=0.06)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
@torch.inference_mode()
def test_without_a_route_it_is_the_plain_layer_bit_for_bit(dtype: torch.dtype, bias: bool, num_tokens: int) -> None:
    rig = Rig(bias, dtype)
    x = torch.randn(1, num_tokens, NUM_INPUTS).to(dtype)
    assert torch.equal(rig.layer(x), rig.linear(x))


@torch.inference_mode()
def test_a_route_is_for_one_step_only() -> None:
    rig = Rig(bias=True)
    x = torch.randn(NUM_TOKENS, NUM_INPUTS)
    rig.active.route = Route.of(TERMS, NUM_TOKENS)
    with_route = rig.layer(x)
    rig.active.route = None
    assert torch.equal(rig.layer(x), rig.linear(x))
    assert not torch.allclose(with_route, rig.linear(x))


@torch.inference_mode()
def test_inputs_and_weights_are_not_changed() -> None:
    rig = Rig(bias=True)
    x = torch.randn(NUM_TOKENS, NUM_INPUTS)
    before = x.clone(), rig.layer.product.weight.clone(), rig.linear.bias.clone()
    rig.active.route = Route.of(TERMS, NUM_TOKENS)
    rig.layer(x)
    assert all(torch.equal(old, new) for old, new in zip(before, (x, rig.layer.product.weight, rig.linear.bias), strict=True))


class Block(nn.Module):
    """Two linear layers, one of them without a bias, and one that is no target."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj, self.up = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 4, bias=False)


def frozen_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).requires_grad_(False)


def test_attach_replaces_the_targets_and_nothing_else() -> None:
    model = frozen_model()
    before = dict(model.named_modules())
    operands = attach(model, {"0.q_proj": (9, 6), "1.up": (4, 6)}, BASES, RANK, 3, ActiveRoute())
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] is not before[name]} == {"0.q_proj", "1.up"}
    assert all(isinstance(after[name], LoriLinear) for name in ("0.q_proj", "1.up"))
    assert {name: tuple(o.dense.shape) for name, o in operands.items()} == {"0.q_proj": (3, RANK, 9), "1.up": (3, RANK, 4)}


def test_attach_to_a_layer_of_the_model_itself() -> None:
    model = Block().requires_grad_(False)
    attach(model, {"q_proj": (9, 6)}, BASES, RANK, 1, ActiveRoute())
    assert isinstance(model.q_proj, LoriLinear)


def test_attached_layers_read_one_route_and_the_operands_that_are_returned() -> None:
    model, plain, active = frozen_model(), frozen_model(), ActiveRoute()
    operands = attach(model, {"0.q_proj": (9, 6), "1.q_proj": (9, 6)}, BASES, RANK, 2, active)
    x = torch.randn(4, 6)
    for index, block in enumerate((model[0], model[1])):
        b = torch.randn(9, RANK)
        put(operands[f"{index}.q_proj"], 1, b, 1)
        active.route = Route.of([Term(0, 4, 1, 0.5)], 4)
        a = BASES[1].draw(f"{index}.q_proj", RANK, 6)  # drawn under the layer's full name
        torch.testing.assert_close(block.q_proj(x), plain[index].q_proj(x) + 0.5 * x @ a.T @ b.T, rtol=1e-5, atol=1e-5)


def test_empty_slots_add_nothing() -> None:
    model, plain, active = frozen_model(), frozen_model(), ActiveRoute()
    attach(model, {"0.q_proj": (9, 6)}, BASES, RANK, 2, active)
    active.route = Route.of([Term(0, 4, 1, 3.0)], 4)
    x = torch.randn(4, 6)
    torch.testing.assert_close(model[0].q_proj(x), plain[0].q_proj(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_and_basis_take_the_layer_s_dtype(dtype: torch.dtype) -> None:
    model = frozen_model().to(dtype)
    operands = attach(model, {"0.q_proj": (9, 6)}, BASES, RANK, 2, ActiveRoute())
    assert operands["0.q_proj"].layout.dtype == dtype
    assert model[0].q_proj.product.weight.dtype == dtype
    drawn = BASES[1].draw("0.q_proj", RANK, 6).to(dtype)
    assert torch.equal(model[0].q_proj.product.weight[9 + RANK :], drawn)


def test_a_replaced_weight_is_freed() -> None:
    model = frozen_model()
    weight = weakref.ref(model[0].q_proj.weight)
    attach(model, {"0.q_proj": (9, 6)}, BASES, RANK, 2, ActiveRoute())
    gc.collect()
    assert weight() is None


def test_attached_weights_take_no_gradient() -> None:
    model = frozen_model()
    attach(model, {"0.q_proj": (9, 6)}, BASES, RANK, 2, ActiveRoute())
    assert not model[0].q_proj(torch.randn(2, 6)).requires_grad


# --- layers that read one input


class Attention(nn.Module):
    """Three layers on one input, as attention has them, and one on another."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(6, 9, bias=bias), nn.Linear(6, 4, bias=False)
        self.v_proj, self.o_proj = nn.Linear(6, 5, bias=bias), nn.Linear(9, 6, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


SHAPES = {"q_proj": (9, 6), "k_proj": (4, 6), "v_proj": (5, 6), "o_proj": (6, 9)}
STEP = Route.of([Term(0, 3, 0, 0.5), Term(1, 4, 1, -2.0)], 4)


class SharedRig:
    """`Attention` with two slots on two bases in all its layers, and the same unchanged."""

    def __init__(self, bias: bool = False) -> None:
        torch.manual_seed(0)
        self.plain = Attention(bias).requires_grad_(False)
        self.model = Attention(bias).requires_grad_(False)
        self.model.load_state_dict(self.plain.state_dict())
        self.active = ActiveRoute()
        self.operands = attach(self.model, SHAPES, BASES, RANK, 2, self.active)
        self.deltas = {name: [torch.randn(d, RANK) for _ in BASES] for name, (d, _) in SHAPES.items()}
        for name, deltas in self.deltas.items():
            for slot, b in enumerate(deltas):
                self.operands[name].put(slot, self.operands[name].pack(sparse(b)), slot)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for name in ("q_proj", "k_proj", "v_proj"):
            y = getattr(self.plain, name)(x)
            for start, stop, terms in STEP.spans:
                for slot, weight in terms:
                    a = BASES[slot].draw(name, RANK, 6)
                    y[start:stop] += weight * x[start:stop] @ a.T @ self.deltas[name][slot].T
            outputs.append(y)
        return torch.cat(outputs, dim=-1)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the weight of every product that a layer takes, in order."""
    rows: list[int] = []

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows.append(len(weight))
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr("lori.layer.F", SimpleNamespace(linear=linear))
    return rows


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_layers_on_one_input_take_one_product(bias: bool, products: list[int]) -> None:
    rig, x = SharedRig(bias), torch.randn(4, 6)
    rig.active.route = STEP
    torch.testing.assert_close(rig.model(x), rig.expected(x), rtol=1e-5, atol=1e-5)
    assert products == [9 + 4 + 5 + 3 * 2 * RANK]
    rig.active.route = None
    torch.testing.assert_close(rig.model(x), rig.plain(x))
    assert products[1:] == [9 + 4 + 5]


@torch.inference_mode()
def test_layers_that_are_called_on_other_tensors_answer_right(products: list[int]) -> None:
    rig, x, other = SharedRig(), torch.randn(4, 6), torch.randn(4, 6)
    rig.active.route = STEP
    q, k, v = rig.model.q_proj(x), rig.model.k_proj(other), rig.model.v_proj(x.clone())
    expected, of_other = rig.expected(x), rig.expected(other)
    torch.testing.assert_close(torch.cat([q, v], 1), expected[:, [*range(9), *range(13, 18)]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k, of_other[:, 9:13], rtol=1e-5, atol=1e-5)
    assert len(products) == 3


@torch.inference_mode()
def test_a_shared_product_holds_nothing_when_all_have_taken_it() -> None:
    rig = SharedRig()
    x = torch.randn(4, 6)
    held = weakref.ref(x)
    rig.model(x)
    del x
    gc.collect()
    assert held() is None


@torch.inference_mode()
def test_a_layer_that_is_called_again_on_its_input_gives_its_own_answer_again() -> None:
    rig, x = SharedRig(), torch.randn(4, 6)
    rig.active.route = STEP
    first = rig.model.q_proj(x).clone()
    torch.testing.assert_close(rig.model.q_proj(x), first)


@torch.inference_mode()
def test_a_model_that_has_run_can_be_copied() -> None:
    rig, x = SharedRig(), torch.randn(4, 6)
    rig.active.route = STEP
    rig.model.q_proj(x)  # k and v have yet to take theirs
    copied = deepcopy(rig.model)
    torch.testing.assert_close(copied(x), rig.model(x))


def test_a_wrong_shape_is_refused_within_torch_compile() -> None:
    operands = Operands(1, 8, 40, torch.float32, "cpu")
    put(operands, 0, torch.ones(40, 8))
    route = Route.of([Term(0, 4, 0, 1.0)], 4)
    compiled = torch.compile(lambda y, s: add_delta(y, s, operands, route), backend="aot_eager")
    with pytest.raises(ValueError, match=r"expected \(4, 40\)"):
        compiled(torch.zeros(4, 44), torch.ones(4, 1, 8))


@torch.inference_mode()
def test_torch_compile_takes_the_whole_model_as_one_graph() -> None:
    rig, x = SharedRig(bias=True), torch.randn(4, 6)
    compiled = torch.compile(rig.model, fullgraph=True, backend="aot_eager")
    for route in (STEP, None, STEP):
        rig.active.route = route
        expected = rig.model(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


def test_module_shapes_are_every_linear_layer_but_the_output_embeddings(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    shapes = module_shapes(model)
    layer = {
        "self_attn.q_proj": (64, 48), "self_attn.k_proj": (32, 48), "self_attn.v_proj": (32, 48), "self_attn.o_proj": (48, 64),
        "mlp.gate_proj": (80, 48), "mlp.up_proj": (80, 48), "mlp.down_proj": (48, 80),
    }  # fmt: skip
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert shapes == expected
    assert next(iter(shapes)) == "model.layers.0.self_attn.q_proj"
