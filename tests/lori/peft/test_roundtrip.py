"""Equal results of PEFT and this package with the same adapter, imported and exported, on four architectures."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from lori.adapter import Adapter
from lori.base_identity import identify
from lori.basis import Explicit, Seeded
from lori.config import new_config
from lori.format import load_adapter, save_adapter, seal
from lori.peft.exporter import export_peft
from lori.peft.importer import Imported, import_peft
from lori.sparse import SparseB
from tests.lori.served import Served

# PEFT uses a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 60, 17, 3, 41, 64, 64, 8]])
SIZES: dict[str, Any] = {
    "vocab_size": 70, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, tie_word_embeddings=False),
    "gemma": GemmaConfig(**SIZES),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "rsLoRA": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 2}},
    "ranks": {"target_modules": ["k_proj", "o_proj"], "rank_pattern": {"layers.1.self_attn.o_proj": 3, "k_proj": 6}},
    "alphas": {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"layers.0.*": 9, "^model.layers.1.mlp.up_proj": 1}},
    "one layer": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
}


def make_model(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Return a tiny random model, once for each architecture."""
    return make_model(request.param)


def make_peft(model: PreTrainedModel, **variant: Any) -> PeftModel:
    """Return `model` with a random LoRA adapter whose B is nonzero in a tenth of its entries."""
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=14, **variant)).eval()
    g = torch.Generator().manual_seed(1)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            mask = torch.rand(parameter.shape, generator=g) < 0.1
            parameter.data = torch.randn(parameter.shape, generator=g) * mask
        elif "lora_A" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
    return lora


def served_logits(model: PreTrainedModel, adapter: Adapter) -> torch.Tensor:
    """Return the logits of `model` with `adapter` in a slot. Modifies `model`."""
    served = Served(model, [adapter])
    served.apply([(adapter.name, 0, IDS.numel(), 1.0)], IDS.numel())
    return served.logits(IDS)


def logits(model: Callable[..., Any]) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def import_from(folder: Path, model: PreTrainedModel, **options: Any) -> Imported:
    return import_peft(folder, identify(model, "a/base"), name="math", **options)


def stored(store: Path, imported: Imported, model: PreTrainedModel) -> Adapter:
    """Save an import in `store` and load it as a server does."""
    assert isinstance(imported.adapter.basis, Explicit)
    save_adapter(imported.adapter, store / "math")
    return load_adapter(store / "math", identify(model, "a/base"))


def make_seeded(model: PreTrainedModel, targets: tuple[str, ...], ranks: dict[str, int]) -> Adapter:
    """Return a random adapter on a seeded basis with several alphas. `ranks` has ranks by last name part; 5 is the default."""
    base, g = identify(model, "a/base"), torch.Generator().manual_seed(2)
    modules = {}
    for name, (num_outputs, _) in base.shapes.items():
        if name in targets or name.rpartition(".")[2] in targets:
            shape = (num_outputs, ranks.get(name.rpartition(".")[2], 5))
            modules[name] = SparseB.from_dense(3 * torch.randn(shape, generator=g), torch.rand(shape, generator=g) < 0.1)
    config = new_config(
        modules,
        Seeded(seed=4),
        base,
        alphas=dict.fromkeys(modules, 7.5) | {next(iter(modules)): 11.0},
        target_modules=targets,
        values="float32",
        templates=("chat",),
        training={},
    )
    return seal(Adapter("math", config, modules, Seeded(seed=4))).adapter


def assert_close(actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    assert (expected - base).abs().max() > 0.05  # or the adapter would not matter
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_import_computes_the_same_as_peft(model: PreTrainedModel, tmp_path: Path, variant: str) -> None:
    before = logits(model)
    lora = make_peft(deepcopy(model), **VARIANTS[variant])
    lora.save_pretrained(str(tmp_path / "peft"))
    imported = import_from(tmp_path / "peft", model)
    adapter = stored(tmp_path / "store", imported, model)
    assert 0.8 < adapter.config.lori.sparsity < 0.98
    assert imported.ignored == ()
    assert_close(served_logits(model, adapter), logits(lora), before)


def test_embeddings_that_peft_saved_do_not_matter(model: PreTrainedModel, tmp_path: Path) -> None:
    before = logits(model)
    lora = make_peft(deepcopy(model), **VARIANTS["plain"])
    lora.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=True)
    imported = import_from(tmp_path / "peft", model)
    assert "base_model.model.model.embed_tokens.weight" in imported.ignored
    assert_close(served_logits(model, stored(tmp_path / "store", imported, model)), logits(lora), before)


@pytest.mark.parametrize(
    ("targets", "ranks"),
    [
        (("q_proj", "v_proj", "up_proj"), {}),
        (("k_proj", "o_proj", "down_proj"), {"down_proj": 3}),
        (("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"), {}),
    ],
    ids=["last parts", "ranks", "full names"],
)
def test_an_export_computes_the_same_in_peft(
    model: PreTrainedModel, tmp_path: Path, targets: tuple[str, ...], ranks: dict[str, int]
) -> None:
    before, adapter = logits(model), make_seeded(model, targets, ranks)
    lora = PeftModel.from_pretrained(deepcopy(model), str(export_peft(adapter, tmp_path / "out")))
    assert_close(logits(lora), served_logits(model, adapter), before)


@pytest.mark.parametrize("ranks", [{}, {"up_proj": 2}], ids=["one rank", "two ranks"])
def test_import_undoes_export(model: PreTrainedModel, tmp_path: Path, ranks: dict[str, int]) -> None:
    adapter = make_seeded(model, ("q_proj", "up_proj"), ranks)
    imported = import_from(export_peft(adapter, tmp_path / "out"), model).adapter
    assert list(imported.modules) == list(adapter.modules)
    for module, b in adapter.modules.items():
        assert torch.equal(imported.modules[module].indices, b.indices)
        assert torch.equal(imported.modules[module].values, b.values)
        shape = (b.shape[1], identify(model, "a/base").shapes[module][1])
        assert torch.equal(imported.basis.draw(module, *shape), adapter.basis.draw(module, *shape))
        assert imported.config.scale_of(module) == adapter.config.scale_of(module)
    assert imported.config.target_modules == adapter.config.target_modules
    assert imported.config.lori.basis_digest == adapter.config.lori.basis_digest
