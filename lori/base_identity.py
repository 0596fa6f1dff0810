"""The digest of a base model: of its architecture and of samples of its weights, loaded or in files.

Weights are compared in bf16, so a base in fp32 and in bf16 is the same. Only a few values of each tensor are read, from files,
too: this is quick for the largest models.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, StrictDataclassError  # type: ignore[attr-defined]  # httpx's, some of which pass through
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

    The output embeddings are not among them.
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
"""What of a config, and of its `rope_parameters`, changes what a base computes; the names are transformers'. Not the whole of
it: a field that a later version adds would make every adapter one of another base."""

Samples = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Returns the sampled values of the parameter of this name and shape, see `positions`, in any dtype."""


def positions(num_values: int) -> torch.Tensor:
    """Return which values of a flat tensor are sampled, (n,) int64: `SAMPLED_PER_TENSOR` at most, evenly spread."""
    step = max(1, num_values // SAMPLED_PER_TENSOR)
    return torch.arange(0, num_values, step)[:SAMPLED_PER_TENSOR]


def identify(model: PreTrainedModel, name: str) -> BaseIdentity:
    """Return the identity of a loaded `model`, called `name`, whose layers must still be its own."""
    parameters = dict(model.named_parameters())

    def samples(parameter: str, _: tuple[int, ...]) -> torch.Tensor:
        flat = parameters[parameter].detach().reshape(-1)
        return flat[positions(flat.numel()).to(flat.device)]

    return BaseIdentity(name, _digest(model, samples), module_shapes(model))


def identify_files(name: str | None) -> BaseIdentity:
    """Return the identity of the base called `name` (a local folder or a hub id; `None` is the embedded model), not loading it.

    A hub id's weights are fetched whole. Raises `ModelError` where it is not there, or where its files do not hold its parameters
    one by one, by their names.
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
    """Return a sha256 (hex) over the architecture, and every parameter's name, shape and samples in bf16."""
    config = model.config.get_text_config()
    said = {key: _said(getattr(config, key, None)) for key in ARCHITECTURE}
    known = {key: value for key, value in said.items() if value is not None}
    sha = hashlib.sha256(f"{model.config.model_type}|{json.dumps(known, sort_keys=True)}".encode())
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        sha.update(f"|{name}|{shape}|".encode())
        sha.update(samples(name, shape).to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _said(value: Any) -> Any:
    """Return a config's value; of a dict, which `rope_parameters` is, maybe for each type of layer, what `ROPE` names."""
    if not isinstance(value, dict):
        return value
    return {k: _said(v) for k, v in value.items() if v is not None and (k in ROPE or isinstance(v, dict))}


def _check_tied(model: PreTrainedModel, samples: Samples) -> None:
    """Raise `ValueError` where the files hold a tied parameter of its own value: loading would not tie it."""
    own = dict(model.named_parameters())
    name_of = {id(parameter): name for name, parameter in own.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in own:
            continue
        shape = tuple(parameter.shape)
        try:
            found = samples(name, shape)
        except UNREADABLE:  # the files have it once, under its other name
            continue
        if not torch.equal(found, samples(name_of[id(parameter)], shape)):
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
    """Return the slice of a tensor of `shape` that holds its value at a flat `position` alone."""
    out = []
    for length in reversed(list(shape)):
        out.append(slice(position % length, position % length + 1))
        position //= length
    return tuple(reversed(out))
