"""The digest of a base model, over its architecture and samples of its weights. The model may be loaded or on disk.

Samples are rounded to bf16, so the fp32 and the bf16 copy of a base have one digest. Only a few values of each tensor are read,
also from files, so this is fast for the largest models.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, StrictDataclassError  # type: ignore[attr-defined]  # httpx's errors, some of which huggingface_hub lets through
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lori.embedded import embedded_model
from lori.errors import ModelError
from lori.identity import BaseIdentity
from lori.model_folder import folder_fault
from lori.names import EMBEDDED_NAME, short_name
from lori.store.hub import check_model
from lori.tensor_file import UNREADABLE


def module_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of every linear layer of `model` that can take a delta, by full name in model order.

    The output embeddings are left out.
    """
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }


SAMPLED_PER_TENSOR = 64
ARCHITECTURE = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "activation_function",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "no_rope_layers", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling",
    "logit_scale", "rope_parameters",
)  # fmt: skip
ROPE = (
    "rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "partial_rotary_factor", "mscale",
    "mscale_all_dim",
)  # fmt: skip
"""Fields of a config, and keys of its `rope_parameters`, that change what a base computes; the names are transformers'. A digest
over the whole config would not do: a field that a later transformers adds would change the digest of every base."""

Samples = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Function of a parameter's name and shape that returns its sampled values (see `positions`), in any dtype."""


def positions(num_values: int) -> torch.Tensor:
    """Return the positions of the sampled values in a flat tensor, (n,) int64: at most `SAMPLED_PER_TENSOR`, evenly spread."""
    step = max(1, num_values // SAMPLED_PER_TENSOR)
    return torch.arange(0, num_values, step)[:SAMPLED_PER_TENSOR]


def identify(model: PreTrainedModel, name: str) -> BaseIdentity:
    """Return the identity of a loaded `model`, called `name`. Its layers must not have been replaced yet."""
    parameters = dict(model.named_parameters())

    def samples(parameter: str, _: tuple[int, ...]) -> torch.Tensor:
        flat = parameters[parameter].detach().reshape(-1)
        return flat[positions(flat.numel()).to(flat.device)]

    return BaseIdentity(name, _digest(model, samples), module_shapes(model))


def identify_files(name: str | None) -> BaseIdentity:
    """Return the identity of the base `name` (a local folder or a hub id; `None` is the embedded model) without loading it.

    The weights of a hub id are downloaded whole. Raises `ModelError` if the base is missing, or if its files do not hold each
    parameter under its name.
    """
    source = str(embedded_model()) if name is None else name
    if not (source.startswith((".", "/")) or Path(source).exists()):
        check_model(source)
    elif fault := folder_fault(Path(source)):
        raise ModelError(f"cannot identify the base model {source!r}: {fault}")
    try:
        folder = (
            Path(source)
            if Path(source).is_dir()
            else Path(snapshot_download(source, allow_patterns=["*.safetensors*", "*.json"]))
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        samples = _file_samples(folder)
        _check_tied(model, samples)
        digest = _digest(model, samples)
    except (OSError, ValueError, ArithmeticError, ImportError, HTTPError, StrictDataclassError, *UNREADABLE) as error:
        raise ModelError(f"cannot identify the base model {source!r} by its files: {' '.join(str(error).split())}") from error
    return BaseIdentity(EMBEDDED_NAME if name is None else short_name(name), digest, module_shapes(model))


def _digest(model: PreTrainedModel, samples: Samples) -> str:
    """Return the sha256 (hex) over the architecture and every parameter's name, shape and samples in bf16."""
    config = model.config.get_text_config()
    fields = {key: _digested_value(getattr(config, key, None)) for key in ARCHITECTURE}
    present = {key: value for key, value in fields.items() if value is not None}
    sha = hashlib.sha256(f"{model.config.model_type}|{json.dumps(present, sort_keys=True)}".encode())
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        sha.update(f"|{name}|{shape}|".encode())
        sha.update(samples(name, shape).to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _digested_value(value: Any) -> Any:
    """Return a config field as it enters the digest.

    A dict is reduced to the keys in `ROPE`. `rope_parameters` is one, or holds one for each type of layer.
    """
    if not isinstance(value, dict):
        return value
    return {k: _digested_value(v) for k, v in value.items() if v is not None and (k in ROPE or isinstance(v, dict))}


def _check_tied(model: PreTrainedModel, samples: Samples) -> None:
    """Raise `ValueError` if the files hold a separate value for a tied parameter: loading would then not tie it."""
    parameters = dict(model.named_parameters())
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in parameters:
            continue
        shape = tuple(parameter.shape)
        try:
            values = samples(name, shape)
        except UNREADABLE:  # the files hold the tied parameter only once, under its other name
            continue
        if not torch.equal(values, samples(name_of[id(parameter)], shape)):
            raise ValueError(f"{name} is said to be tied to {name_of[id(parameter)]}, and has values of its own")


def _file_samples(folder: Path) -> Samples:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    is_sharded = index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file()  # as transformers chooses
    file_of = json.loads(index.read_text())["weight_map"] if is_sharded else None

    def samples(parameter: str, shape: tuple[int, ...]) -> torch.Tensor:
        with safe_open(folder / (file_of[parameter] if file_of else SAFE_WEIGHTS_NAME), framework="pt") as file:
            part = file.get_slice(parameter)
            if tuple(part.get_shape()) != shape:
                raise ValueError(f"{parameter} has the shape {tuple(part.get_shape())}, expected {shape}")
            return torch.stack([part[_corner(at, shape)].reshape(()) for at in positions(torch.Size(shape).numel()).tolist()])

    return samples


def _corner(position: int, shape: Iterable[int]) -> tuple[slice, ...]:
    """Return the slices that select the single value at a flat `position` in a tensor of `shape`."""
    out = []
    for length in reversed(list(shape)):
        out.append(slice(position % length, position % length + 1))
        position //= length
    return tuple(reversed(out))
