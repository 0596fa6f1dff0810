"""Export of a LoRI adapter as a PEFT LoRA folder, for PEFT and servers that read its format. Does not import PEFT.

Shapes: D outputs, R rank, N inputs of a module.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save as save_tensors

from lori.adapter import Adapter
from lori.config import CONFIG_FILE, AdapterConfig
from lori.errors import AdapterError
from lori.format import WEIGHTS_FILE
from lori.peft.config import TEMPLATES_FILE, PeftConfig, exact_pattern
from lori.store.files import new_folder, write_file

PREFIX = "base_model.model."
"""Prefix of a module's name in PEFT's files."""


def export_peft(adapter: Adapter, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write `adapter` to a new `folder` in PEFT's format and return the folder. Writes A (R, N) and a dense B (D, R) in `dtype`.

    fp32 is exact; fp16 and bf16 are half the size and round A and B. Raises `AdapterError` if `folder` exists, or if `dtype`
    cannot hold a value.
    """
    if folder.exists() or folder.is_symlink():
        raise AdapterError(f"{folder} is there already: an export goes to a new folder")
    tensors = _tensors(adapter, dtype)
    if too_large := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise AdapterError(f"{dtype} cannot hold values of {', '.join(too_large)}: export as torch.float32")
    with new_folder(folder) as scratch:
        write_file(scratch / WEIGHTS_FILE, save_tensors(tensors, metadata={"format": "pt"}))
        write_file(scratch / TEMPLATES_FILE, json.dumps({"templates": adapter.config.lori.templates}).encode() + b"\n")
        write_file(scratch / CONFIG_FILE, _config(adapter.config).model_dump_json(indent=2, exclude_none=True).encode() + b"\n")
    return folder


def _config(config: AdapterConfig) -> PeftConfig:
    """Return PEFT's config for an adapter with `config`. Each pattern for a rank or an alpha matches one module."""
    return PeftConfig(
        peft_type="LORA",
        base_model_name_or_path=config.base_model_name_or_path,
        r=config.r,
        lora_alpha=config.lora_alpha,
        rank_pattern={exact_pattern(module): rank for module, rank in config.rank_pattern.items()},
        alpha_pattern={exact_pattern(module): alpha for module, alpha in config.alpha_pattern.items()},
        target_modules=config.target_modules,
    )


def _tensors(adapter: Adapter, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, b in adapter.modules.items():
        a = adapter.basis.draw(module, b.shape[1], adapter.shape_of(module)[1])  # (R, N)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.dense(dtype)
    return tensors
