"""Which base model an adapter is for: a digest of its architecture and of samples of its weights, loaded or still in its files.

The weights are compared in bf16, so a base in fp32 and in bf16 is the same. A few values of each tensor are read, which is quick
for the largest models: from files, nothing else of the weights is.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lori.embedded import EMBEDDED_NAME, embedded_model
from lori.errors import ModelError
from lori.identity import BaseIdentity
from lori.layer import module_shapes
from lori.tensor_file import UNREADABLE

SAMPLED_PER_TENSOR = 64
ARCHITECTURE = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps")
ROPE = ("rope_type", "rope_theta", "factor")
"""What two bases of one type, and of the same shapes, may differ in; the names are those of transformers' configs."""

Samples = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Returns the sampled values of the parameter of this name and shape, see `positions`, in any dtype."""


def positions(num_values: int) -> torch.Tensor:
    """Returns which values of a flat tensor are sampled: `SAMPLED_PER_TENSOR` at most, evenly spread."""
    step = max(1, num_values // SAMPLED_PER_TENSOR)
    return torch.arange(0, num_values, step)[:SAMPLED_PER_TENSOR]


def identify(model: PreTrainedModel, name: str) -> BaseIdentity:
    """Returns the identity of a loaded `model`, called `name`, whose layers must still be its own."""
    parameters = dict(model.named_parameters())

    def samples(parameter: str, _: tuple[int, ...]) -> torch.Tensor:
        flat = parameters[parameter].detach().reshape(-1)
        return flat[positions(flat.numel()).to(flat.device)]

    return BaseIdentity(name, _digest(model, samples), module_shapes(model))


def identify_files(name: str | None) -> BaseIdentity:
    """Returns the identity of the base called `name` (a local folder or a hub id; `None` is the embedded model), not loading it.

    Raises `ModelError` where it is not there, or where its files do not hold its parameters one by one, by their names.
    """
    source = str(embedded_model()) if name is None else name
    if source.startswith((".", "/")) and not Path(source).is_dir():
        raise ModelError(f"cannot identify the base model {source!r}: there is no such folder")
    try:
        folder = (
            Path(source)
            if Path(source).is_dir()
            else Path(snapshot_download(source, allow_patterns=["*.safetensors*", "*.json"]))
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        digest = _digest(model, _file_samples(folder))
    except (OSError, ValueError, ImportError, *UNREADABLE) as error:
        raise ModelError(f"cannot identify the base model {source!r} by its files: {' '.join(str(error).split())}") from error
    return BaseIdentity(EMBEDDED_NAME if name is None else short_name(name), digest, module_shapes(model))


def short_name(name: str) -> str:
    """Returns what a person calls the base `name`: a folder's last part, or the hub id."""
    return Path(name).name if Path(name).is_dir() else name


def _digest(model: PreTrainedModel, samples: Samples) -> str:
    """Returns a sha256 (hex) over the architecture, and every parameter's name, shape and samples in bf16."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    said: dict[str, Any] = {key: getattr(config, key, None) for key in ARCHITECTURE} | {key: rope.get(key) for key in ROPE}
    sha = hashlib.sha256(f"{model.config.model_type}|{json.dumps(said, sort_keys=True)}".encode())
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        sha.update(f"|{name}|{shape}|".encode())
        sha.update(samples(name, shape).to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _file_samples(folder: Path) -> Samples:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    file_of = json.loads(index.read_text())["weight_map"] if index.is_file() else None

    def samples(parameter: str, shape: tuple[int, ...]) -> torch.Tensor:
        with safe_open(folder / (file_of[parameter] if file_of else SAFE_WEIGHTS_NAME), framework="pt") as file:
            part = file.get_slice(parameter)
            if tuple(part.get_shape()) != shape:
                raise ValueError(f"{parameter} has the shape {tuple(part.get_shape())}, expected {shape}")
            return torch.stack([part[_corner(at, shape)].reshape(()) for at in positions(torch.Size(shape).numel()).tolist()])

    return samples


def _corner(position: int, shape: Iterable[int]) -> tuple[slice, ...]:
    """Returns the slice of a tensor of `shape` that holds its value at a flat `position` alone."""
    out = []
    for length in reversed(list(shape)):
        out.append(slice(position % length, position % length + 1))
        position //= length
    return tuple(reversed(out))
