"""The base model: lookup, loading and identity."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lori.base_identity import identify, identify_files
from lori.base_model import default_dtype, load_base_model, resolve_dtype
from lori.errors import ModelError
from lori.names import EMBEDDED_NAME
from lori.native import MAX_ISA_VARIABLE
from lori.template import encode
from tests.tiny import save_tiny_model, tiny_llama_config

GOLDEN_DIGEST = "02245bbda3abf6c767d8314dfaa3897f04a16dc3150c5f1bde2cfd9171880d2a"
EMBEDDED_DIGEST = "8a2bcc5f7ffada7bfd0d8ccde0fd4154703c14d8b73d214e3565432b1d0326fd"


def counted_model(**changes: Any) -> PreTrainedModel:
    """Return a tiny Llama whose parameters count up, so they are the same on every machine."""
    model = AutoModelForCausalLM.from_config(tiny_llama_config(257, **changes), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = (torch.arange(parameter.numel()) % 97 / 64 - 0.75).view(parameter.shape)
    return model


# --- loading


def test_a_folder_is_loaded_for_inference(tiny_model: Path) -> None:
    base = load_base_model(str(tiny_model), torch.float32)
    assert base.name == "tiny-llama"
    assert base.model.dtype == torch.float32
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.identity.digest == digest_of(base.model)
    assert base.tokenizer.decode(base.tokenizer("Hé").input_ids) == "Hé"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_requested_attention_is_used(tiny_model: Path, attention: str) -> None:
    assert load_base_model(str(tiny_model), torch.float32, attention).model.config._attn_implementation == attention


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody/nothing"])
def test_a_missing_model_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=f"^cannot load the base model '{name}': "):
        load_base_model(name, torch.float32)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^cannot load the base model '{tmp_path}': "):
        load_base_model(str(tmp_path), torch.float32)


def test_an_unknown_attention_is_a_model_error(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="nonsense"):
        load_base_model(str(tiny_model), torch.float32, "nonsense")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()  # not in place: a loaded model may have mapped it
    (folder / "model.safetensors").write_bytes(weights[:-100])


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / "model.safetensors").unlink(), id="no weights"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{"), id="config is not JSON"),
        pytest.param(lambda folder: edit_config(folder, model_type="zzz"), id="unknown architecture"),
        pytest.param(lambda folder: edit_config(folder, model_type="vit"), id="no language model"),
        pytest.param(lambda folder: (folder / "tokenizer.json").write_text("{"), id="broken tokenizer"),
        # An interrupted download. Regression: it raised a SafetensorError.
        pytest.param(cut_weights, id="weights cut off"),
        # Regression: it raised a RuntimeError.
        pytest.param(lambda folder: edit_config(folder, intermediate_size=96), id="weights of another shape"),
        # Regression: it was loaded, with random numbers for the third layer.
        pytest.param(lambda folder: edit_config(folder, num_hidden_layers=3), id="weights of a layer missing"),
    ],
)
def test_a_damaged_model_is_a_model_error(tiny_model: Path, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ModelError, match=f"^cannot load the base model '{folder}': "):
        load_base_model(str(folder), torch.float32)


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | changes))


def test_a_tokenizers_own_truncation_and_padding_are_disabled(tiny_model: Path, tmp_path: Path) -> None:
    # Some files on the hub enable both: a long prompt would be cut in silence.
    folder = shutil.copytree(tiny_model, tmp_path / "cutting")
    padding = {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    edit_tokenizer(
        folder,
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding=padding | {"pad_type_id": 0, "pad_token": "!"},
    )
    tokenizer = load_base_model(str(folder), torch.float32).tokenizer
    assert len(encode(tokenizer, "x" * 9).ids) == 9


def test_a_tokenizer_without_a_fast_form_is_a_model_error(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "slow")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(ModelError, match=r"has no fast form \(tokenizer.json\)"):
        load_base_model(str(folder), torch.float32)


# --- identity


def test_a_base_is_the_same_in_fp32_and_bf16(tiny_model: Path) -> None:
    wide, narrow = (load_base_model(str(tiny_model), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (wide.model.dtype, narrow.model.dtype) == (torch.float32, torch.bfloat16)
    assert wide.identity == narrow.identity


def test_a_base_is_the_same_under_another_name(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    ours, theirs = load_base_model(str(tiny_model), torch.float32), load_base_model(str(copy), torch.float32)
    assert (ours.identity, theirs.name) == (theirs.identity, "copy")


def test_other_weights_are_another_base(tiny_model: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert (
        load_base_model(str(other), torch.float32).identity.digest
        != load_base_model(str(tiny_model), torch.float32).identity.digest
    )


def digest_of(model: PreTrainedModel) -> str:
    return identify(model, "a/base").digest


def test_digest_is_the_same_for_ever() -> None:
    # Every adapter's file has the digest. If this test fails, no existing adapter loads any more.
    assert digest_of(counted_model()) == GOLDEN_DIGEST


@torch.no_grad()
def test_digest_changes_with_every_parameter() -> None:
    model = counted_model()
    digests = {GOLDEN_DIGEST}
    for _, parameter in model.named_parameters():
        before = parameter.clone()
        parameter.mul_(1.0625)
        digests.add(digest_of(model))
        parameter.copy_(before)
    assert len(digests) == 1 + len(list(model.parameters()))
    assert digest_of(model) == GOLDEN_DIGEST


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1},
        {"intermediate_size": 81},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"hidden_act": "gelu"},
    ],
)
def test_digest_changes_with_the_architecture(changes: dict[str, Any]) -> None:
    assert digest_of(counted_model(**changes)) != GOLDEN_DIGEST


def test_digest_is_the_same_before_and_after_freezing() -> None:
    assert digest_of(counted_model().eval().requires_grad_(False)) == GOLDEN_DIGEST


def test_a_base_is_identified_by_its_files_alone(tiny_model: Path, tmp_path: Path) -> None:
    loaded = load_base_model(str(tiny_model), torch.float32)
    assert identify_files(str(tiny_model)) == loaded.identity
    assert identify_files(str(tiny_model)).name == loaded.name == "tiny-llama"
    loaded.model.bfloat16().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert identify_files(str(tmp_path / "sharded")) == loaded.identity


def test_a_single_file_is_taken_before_shards(tiny_model: Path, tmp_path: Path) -> None:
    # transformers does so. Regression: the identified base was another than the loaded one.
    load_base_model(str(tiny_model), torch.float32).model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    other = save_tiny_model(tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", tmp_path / "base")
    assert identify_files(str(tmp_path / "base")) == identify_files(str(other))


def test_a_tied_parameter_of_its_own_value_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    # Loading does not tie such a parameter, so the loaded base would be another.
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    for change, is_sound in ((0.0, True), (1.0, False)):
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + change}, folder / "model.safetensors")
        if is_sound:
            assert identify_files(str(folder)) == identify_files(str(tiny_model))
        else:
            with pytest.raises(ModelError, match=r"lm_head\.weight is said to be tied to model\.embed_tokens\.weight"):
                identify_files(str(folder))


@pytest.mark.parametrize("changes", [{"num_attention_heads": 0}, {"hidden_size": -3}, {"hidden_size": "x"}])
def test_a_config_that_makes_no_model_is_a_model_error(tiny_model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    for act in (identify_files, lambda name: load_base_model(name, torch.float32)):
        with pytest.raises(ModelError):
            act(str(folder))


@pytest.mark.parametrize("damage", ["no config", "no weights", "not safetensors", "other shapes", "no such parameter"])
def test_invalid_base_files_are_a_model_error(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    weights, config = folder / "model.safetensors", folder / "config.json"
    match damage:
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "not safetensors":
            weights.write_bytes(b"x" * 99)
        case "other shapes":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 81}))
        case "no such parameter":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="cannot identify the base model"):
        identify_files(str(folder))


# --- dtypes


def test_dtypes_by_name() -> None:
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype("auto") == default_dtype()


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_without_instructions_for_bf16_computes_in_fp32(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: torch.dtype
) -> None:
    """Regression: bf16 was used if oneDNN supports it. On a CPU with plain AVX-512, 32 requests took twice as long."""
    monkeypatch.delenv(MAX_ISA_VARIABLE, raising=False)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has_bf16)
    assert default_dtype() is expected


# --- the embedded model


@pytest.mark.model
def test_the_embedded_model_is_the_one_that_adapters_were_trained_on() -> None:
    base = load_base_model(None, torch.bfloat16)
    assert base.name == EMBEDDED_NAME
    assert base.identity.digest == EMBEDDED_DIGEST
    assert base.tokenizer.chat_template
