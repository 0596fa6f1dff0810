"""PEFT's merges: `linear` equals its `cat`, and the methods that prune equal its own on the dense B."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraConfig, LoraModel
from peft.utils import merge_utils
from transformers import AutoModelForCausalLM

from lori.adapter import Adapter
from lori.base_identity import module_shapes
from lori.basis import Basis
from lori.merge import SignMethod, merge
from lori.sparse import SparseB
from tests.lori.merges import ONE, OTHER, SIGNS, UP0, WEIGHT_SETS, adapter_of, delta, random_b


class Stack:
    """Adapters on one module with `nnz` entries each, and their dense B's times their scales, as PEFT takes them."""

    def __init__(self, alphas: Sequence[float], nnz: int, overlap: bool = True) -> None:
        shape = (16, 4)
        seeds = range(len(alphas))
        bs = [random_b(shape, nnz, seed) for seed in seeds]
        if overlap:  # many positions with an entry in several adapters
            bs = [SparseB(shape, bs[0].indices, random_b(shape, nnz, seed).values) for seed in seeds]
        self.adapters = [
            adapter_of(f"adapter-{i}", {UP0: b}, alpha=alpha) for i, (b, alpha) in enumerate(zip(bs, alphas, strict=True))
        ]
        self.nnz = nnz

    @property
    def dense(self) -> list[torch.Tensor]:
        return [a.config.scale * a.modules[UP0].dense(torch.float64) for a in self.adapters]

    def peft_density(self, density: float) -> float:
        """Return PEFT's density, a fraction of all entries, at which as many survive as at `density` of the nonzero ones."""
        return (round(density * self.nnz) + 0.5) / 64


def total(result: Adapter) -> torch.Tensor:
    return result.config.scale * result.modules[UP0].dense(torch.float64)


STACKS = [Stack((4.0, 4.0, 4.0), 30), Stack((4.0, 1.0, 0.3), 30), Stack((4.0, 1.0, 0.3), 45, overlap=False)]
STACK_IDS = ["one scale", "three scales", "masks that differ"]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("weights", WEIGHT_SETS)
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("stack", STACKS, ids=STACK_IDS)
def test_ties_is_peft_s_on_the_dense_b(stack: Stack, sign: SignMethod, weights: Sequence[float], density: float) -> None:
    result = merge(stack.adapters, weights, "ties", sign=sign, density=density)
    expected = merge_utils.ties(stack.dense, torch.tensor(weights, dtype=torch.float64), stack.peft_density(density), sign)
    torch.testing.assert_close(total(result), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("weights", WEIGHT_SETS)
@pytest.mark.parametrize("stack", STACKS, ids=STACK_IDS)
def test_magnitude_is_peft_s_on_the_dense_b(stack: Stack, weights: Sequence[float], density: float) -> None:
    result = merge(stack.adapters, weights, "magnitude", density=density)
    expected = merge_utils.magnitude_prune(
        stack.dense, torch.tensor(weights, dtype=torch.float64), density=stack.peft_density(density)
    )
    torch.testing.assert_close(total(result), expected, rtol=1e-6, atol=1e-7)


def peft_model(folder: Path, adapters: Sequence[Adapter]) -> Any:
    """Return the model with `adapters` as dense LoRA adapters of PEFT, A and B exact in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    configs = {
        one.name: LoraConfig(r=one.config.r, lora_alpha=int(one.config.lora_alpha), target_modules=list(one.modules))
        for one in adapters
    }
    tuner: Any = LoraModel(model, dict(list(configs.items())[:1]), adapters[0].name)
    for one in adapters[1:]:
        tuner.peft_config[one.name] = configs[one.name]
        tuner.inject_adapter(tuner.model, one.name)
    for one in adapters:
        for module, b in one.modules.items():
            layer = tuner.model.get_submodule(module)
            layer.lora_A[one.name].weight.data.copy_(one.basis.draw(module, b.shape[1], layer.in_features))
            layer.lora_B[one.name].weight.data.copy_(b.dense())
    return tuner


def llama_adapter(
    folder: Path, name: str, lasts: Sequence[str], rank: int, alpha: float, basis: Basis, seed: int
) -> tuple[Adapter, list[str]]:
    """Return a random adapter for the modules of `folder`'s model with a last name part in `lasts`, and these modules' names."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shapes = {module: shape for module, shape in module_shapes(model).items() if module.rpartition(".")[2] in lasts}
    modules = {module: random_b((shape[0], rank), shape[0], seed + i) for i, (module, shape) in enumerate(shapes.items())}
    return adapter_of(name, modules, alpha=alpha, basis=basis, shapes=shapes), list(shapes)


def peft_delta(model: Any, name: str, module: str) -> torch.Tensor:
    weight: torch.Tensor = model.model.get_submodule(module).get_delta_weight(name)
    return weight.detach().double()


@pytest.mark.parametrize("other", [ONE, OTHER], ids=["one basis", "two bases"])
def test_linear_is_peft_s_cat(tiny_model: Path, other: Basis) -> None:
    made = [
        llama_adapter(tiny_model, "math", ["q_proj", "down_proj"], 3, 6.0, ONE, 0),
        llama_adapter(tiny_model, "safety", ["q_proj", "down_proj"], 5, 4.0, other, 100),
        llama_adapter(tiny_model, "intent", ["down_proj", "v_proj"], 8, 8.0, ONE, 200),
    ]
    adapters, weights = [one for one, _ in made], [0.7, 0.5, 1.3]
    model = peft_model(tiny_model, adapters)
    model.add_weighted_adapter([one.name for one in adapters], weights, "cat", combination_type="cat")
    result = merge(adapters, weights)
    assert set(result.modules) == {module for _, modules in made for module in modules}
    for module in result.modules:
        torch.testing.assert_close(delta(result, module), peft_delta(model, "cat", module), rtol=1e-5, atol=1e-6)


def test_peft_s_linear_doubles_a_sum_on_one_basis(tiny_model: Path) -> None:
    # PEFT adds the A's too: (A + A)(B1 + B2) instead of A (B1 + B2). So PEFT's linear is no oracle for ours.
    made = [llama_adapter(tiny_model, name, ["q_proj"], 4, 4.0, ONE, seed) for name, seed in (("math", 0), ("safety", 100))]
    adapters = [one for one, _ in made]
    model = peft_model(tiny_model, adapters)
    model.add_weighted_adapter(["math", "safety"], [1.0, 1.0], "sum", combination_type="linear")
    result = merge(adapters, [1, 1])
    for module in result.modules:
        torch.testing.assert_close(2 * delta(result, module), peft_delta(model, "sum", module), rtol=1e-5, atol=1e-6)
