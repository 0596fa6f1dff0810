"""The frozen base model: look-up by name, and loading. Both the server and the training start here."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from lori.base_identity import identify, identify_files
from lori.embedded import embedded_model
from lori.errors import ModelError
from lori.identity import BaseIdentity
from lori.model_folder import folder_fault, tokenizer_fault
from lori.names import EMBEDDED_NAME, short_name
from lori.native import is_allowed
from lori.store.hub import check_model


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base: its identity, the model and the tokenizer."""

    identity: BaseIdentity
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """The base's name for people."""
        return self.identity.name


CPU = torch.device("cpu")
UNLOADABLE = (OSError, ValueError, ArithmeticError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)
"""Errors that transformers raises for files it cannot load."""


def default_dtype(device: torch.device = CPU) -> torch.dtype:
    """Return bf16 if the device has bf16 instructions that may be used (every supported GPU has), else fp32.

    oneDNN multiplies in bf16 without such instructions too, but several times slower than in fp32.
    """
    if device.type == "cuda":
        return torch.bfloat16
    capability = torch.backends.cpu.get_cpu_capability()
    has_bf16 = is_allowed("avx512_bf16") and capability.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def resolve_dtype(name: str, device: torch.device = CPU) -> torch.dtype:
    """Return the dtype called `name`: "auto" (see `default_dtype`), "bfloat16" or "float32"."""
    return default_dtype(device) if name == "auto" else {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def load_base_model(
    name: str | None, dtype: torch.dtype, attention: str = "sdpa", device: torch.device = CPU, num_processes: int = 1
) -> BaseModel:
    """Load the base called `name` (a local folder or a hub id; `None` is the embedded model) on `device`, for inference.

    `attention` is the name of an attention function registered with transformers. `num_processes` is the number of `torchrun`
    processes: with more than one, the weights are sharded over them and each process reads its shard (FSDP). Raises
    `ModelError` if there is no such base, or the device has no memory for it.
    """
    folder = str(embedded_model()) if name is None else name
    if not (folder.startswith((".", "/")) or Path(folder).exists()):
        check_model(folder)
    elif fault := folder_fault(Path(folder)):
        raise ModelError(f"cannot load the base model {folder!r}: {fault}")
    if not sys.stderr.isatty():  # a terminal shows progress bars for the download and the reading of weights
        disable_progress_bar()
    spread = {"distributed_config": DistributedConfig(fsdp_size=num_processes)} if num_processes > 1 else {}
    tokenizer = _load_tokenizer(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, output_loading_info=True, **spread
        )
    except UNLOADABLE as error:
        raise ModelError(f"cannot load the base model {folder!r}: {' '.join(str(error).split())}") from error
    disable_progress_bar()  # later downloads, while a server runs, show no bar
    model: PreTrainedModel = loaded[0]
    if missing := loaded[1]["missing_keys"]:
        raise ModelError(f"cannot load the base model {folder!r}: its files lack {', '.join(sorted(missing))}")
    model.eval().requires_grad_(False)
    if spread:
        return BaseModel(identify_files(name), model, tokenizer)
    identity = identify(model, EMBEDDED_NAME if name is None else short_name(name))
    try:
        model.to(device)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise ModelError(f"there is no room for {identity.name} on {device}: {' '.join(str(error).split())}") from error
    return BaseModel(identity, model, tokenizer)


def _load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    fault = tokenizer_fault(Path(folder)) if Path(folder).is_dir() else None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except UNLOADABLE as error:
        reason = fault or " ".join(str(error).split())
        raise ModelError(f"cannot load the base model {folder!r}: {reason}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(f"the tokenizer of {folder!r} has no fast form (tokenizer.json)")
    if fault:  # transformers made a tokenizer with an empty vocabulary
        raise ModelError(f"cannot load the base model {folder!r}: {fault}")
    # Some tokenizer files turn truncation or padding on for every text.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer
