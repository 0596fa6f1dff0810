"""The frozen base model: found by name, loaded, and identified. Both the server and the training start here."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lori.embedded import EMBEDDED_NAME, embedded_model
from lori.errors import ModelError
from lori.identity import BaseIdentity
from lori.layer import module_shapes

SAMPLED_PER_TENSOR = 64


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base: `name` as a person would say it, `identity` as an adapter's file does."""

    name: str
    identity: BaseIdentity
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def default_dtype() -> torch.dtype:
    """Returns bf16 where this machine computes in it, else fp32."""
    capability = torch.backends.cpu.get_cpu_capability()
    has_bf16 = capability.startswith("AVX512") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def resolve_dtype(name: str) -> torch.dtype:
    """Returns the dtype called `name`: "auto" (see `default_dtype`), "bfloat16" or "float32"."""
    return default_dtype() if name == "auto" else {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def load_base_model(name: str | None, dtype: torch.dtype, attention: str = "sdpa") -> BaseModel:
    """Loads the base called `name` (a local folder or a hub id; `None` is the embedded model) for inference.

    `attention` is the name of an attention function that transformers knows. Raises `ModelError` where there is none.
    """
    folder = str(embedded_model()) if name is None else name
    if (folder.startswith((".", "/")) or Path(folder).exists()) and not (Path(folder) / "config.json").is_file():
        raise ModelError(f"cannot load the base model {folder!r}: there is no {Path(folder) / 'config.json'}")
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the base model {folder!r}: {' '.join(str(error).split())}") from error
    model: PreTrainedModel = loaded[0]
    if missing := loaded[1]["missing_keys"]:
        raise ModelError(f"cannot load the base model {folder!r}: its files lack {', '.join(sorted(missing))}")
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(f"the tokenizer of {folder!r} has no fast form (tokenizer.json)")
    # Some tokenizer files say to cut or pad every text.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    model.eval().requires_grad_(False)
    name = EMBEDDED_NAME if name is None else _short_name(name)
    return BaseModel(name, identify(model, name), model, tokenizer)


def _short_name(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name


def identify(model: PreTrainedModel, name: str) -> BaseIdentity:
    """Returns what an adapter must know of `model`, called `name`, whose layers must still be its own."""
    return BaseIdentity(name, base_digest(model), module_shapes(model))


def base_digest(model: PreTrainedModel) -> str:
    """Returns a sha256 (hex) over every parameter's name, shape and a few of its values.

    Values are compared in bf16, so a base loaded in fp32 and in bf16 is the same base. Quick for large models: only
    `SAMPLED_PER_TENSOR` values of each tensor are read.
    """
    sha = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED_PER_TENSOR)][:SAMPLED_PER_TENSOR]
        sha.update(f"|{name}|{tuple(parameter.shape)}|".encode())
        sha.update(sample.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
