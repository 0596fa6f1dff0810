"""Applying an adapter locally gives the same logits as folding its delta into the weights."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lori.adapter import Adapter
from lori.base_model import BaseModel, load_base_model
from lori.basis import Basis, Seeded
from lori.config import new_config
from lori.errors import AdapterError, AdapterFormatError, TemplateError, UnknownAdapterError
from lori.format import save_adapter, seal
from lori.merge import merge
from lori.merge_options import MergeOptions
from lori.sparse import SparseB
from lori.template import Template
from tests.tiny import save_tiny_model
from training.evaluation.local_adapters import AdapterSelection, apply_adapter, find_adapter

IDS = torch.arange(20)[None]
TARGETS = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base_model(str(tiny_model), torch.float32)


def make(base: BaseModel, name: str, basis: Basis, rank: int, templates: Sequence[Template] = ("plain",)) -> Adapter:
    """Return an adapter with random values."""
    random = torch.Generator().manual_seed(rank)
    modules = {}
    for module, (num_outputs, _) in base.identity.shapes.items():
        if module.endswith(TARGETS):
            b = 0.5 * torch.randn(num_outputs, rank, generator=random)
            modules[module] = SparseB.from_dense(b, torch.rand(b.shape, generator=random) < 0.3)
    alphas = dict.fromkeys(modules, 2.0 * rank)
    config = new_config(
        modules, basis, base.identity, alphas=alphas, target_modules=TARGETS, values="float32", templates=templates, training={}
    )  # fmt: skip
    return seal(Adapter(name, config, modules, basis)).adapter


def deltas(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Return the sum of the weighted adapters' deltas to each weight, (D, N) fp64."""
    result: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module, b in adapter.modules.items():
            a = adapter.basis.draw(module, b.shape[1], adapter.shape_of(module)[1]).double()
            delta = weight * adapter.config.scale_of(module) * b.dense(torch.float64) @ a
            result[module] = result.get(module, torch.zeros(())) + delta
    return result


def folded_logits(folder: Path, adapters: Sequence[Adapter], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Return the logits (1, T, V) of the base in `dtype` with the deltas added to its weights in fp64."""
    base = load_base_model(str(folder), dtype)
    for module, delta in deltas(adapters, weights).items():
        weight = base.model.get_submodule(module).weight
        assert isinstance(weight, torch.Tensor)
        weight.copy_(weight.double() + delta)
    with torch.no_grad():
        logits: torch.Tensor = base.model(IDS).logits
    return logits.float()


def logits_of(base: BaseModel, selection: AdapterSelection) -> torch.Tensor:
    with torch.no_grad(), apply_adapter(base.model, selection.merged()):
        logits: torch.Tensor = base.model(IDS).logits
    return logits.float()


def test_several_adapters_add_on_one_basis_and_on_several(base: BaseModel, tiny_model: Path) -> None:
    adapters = [make(base, "a", Seeded(), 4), make(base, "b", Seeded(), 6), make(base, "c", Seeded(stream=2), 3)]
    for count, weights in ((0, ()), (1, (1.0,)), (1, (-0.7,)), (2, (0.7, 0.5)), (3, (1.0, -0.5, 2.0))):
        logits = logits_of(base, AdapterSelection(adapters[:count], weights))
        expected = folded_logits(tiny_model, adapters[:count], weights, torch.float32)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    mean = logits_of(base, AdapterSelection(adapters[:2]))
    torch.testing.assert_close(mean, folded_logits(tiny_model, adapters[:2], (0.5, 0.5), torch.float32), rtol=1e-4, atol=1e-4)
    assert (mean - logits_of(base, AdapterSelection([]))).abs().max() > 0.1


def test_a_merge_that_is_no_sum_is_the_one_of_lori_merge(base: BaseModel, tiny_model: Path) -> None:
    adapters = [make(base, "a", Seeded(), 4), make(base, "b", Seeded(), 6)]
    options = MergeOptions("dare_ties", density=0.6, seed=3)
    merged = merge(adapters, (1.0, 0.5), "dare_ties", density=0.6, seed=3)
    expected = folded_logits(tiny_model, [merged], (1.0,), torch.float32)
    torch.testing.assert_close(logits_of(base, AdapterSelection(adapters, (1.0, 0.5), options)), expected, rtol=1e-4, atol=1e-4)


def test_the_model_is_unchanged_afterwards(base: BaseModel) -> None:
    before = logits_of(base, AdapterSelection([]))
    with pytest.raises(ValueError, match="stop"), apply_adapter(base.model, make(base, "a", Seeded(), 4)):
        raise ValueError("stop")
    assert torch.equal(logits_of(base, AdapterSelection([])), before)


def test_adapters_are_found_in_a_store_or_as_folders(base: BaseModel, tmp_path: Path) -> None:
    saved = save_adapter(make(base, "one", Seeded(), 4), tmp_path / "one")
    assert find_adapter("one", tmp_path, base.identity).version == saved.version
    assert find_adapter(f"one@{saved.version[:4]}", tmp_path, base.identity).version == saved.version
    assert find_adapter(str(tmp_path / "one"), None, base.identity).version == saved.version
    with pytest.raises(UnknownAdapterError, match="did you mean 'one'"):
        find_adapter("onw", tmp_path, base.identity)
    with pytest.raises(AdapterError, match="found with --adapters"):
        find_adapter("one", None, base.identity)


def test_an_adapter_of_another_base_is_refused(base: BaseModel, tmp_path: Path) -> None:
    save_adapter(make(base, "one", Seeded(), 4), tmp_path / "one")
    other = load_base_model(str(save_tiny_model(tmp_path / "other", seed=1)), torch.float32)
    with pytest.raises(AdapterFormatError, match="trained on the base"):
        find_adapter("one", tmp_path, other.identity)


def test_a_template_is_one_that_all_were_trained_on(base: BaseModel) -> None:
    both, plain, chat = (
        make(base, name, Seeded(), 4, templates=templates)
        for name, templates in (("both", ("chat", "plain")), ("plain", ("plain",)), ("chat", ("chat",)))
    )
    assert AdapterSelection([]).template() == "chat"
    assert AdapterSelection([both]).template() == "chat"
    assert AdapterSelection([both, plain]).template() == "plain"
    with pytest.raises(TemplateError, match=r"no common template \(plain: plain; chat: chat\)"):
        AdapterSelection([plain, chat]).template()
