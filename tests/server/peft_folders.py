"""Folders of PEFT adapters, as PEFT writes them, and a store that holds them beside a sound adapter of ours."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lori.base_model import BaseModel
from lori.config import CONFIG_FILE
from lori.errors import FOLDER
from lori.format import PICKLE_FILE, WEIGHTS_FILE
from tests.server.rig import write_adapter

CONFIG = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "own/llama", "bias": "none", "corda_config": None,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16,
    "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "peft_type": "LORA", "peft_version": "0.21.0", "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None,
    "target_modules": ["q_proj", "v_proj"], "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip
"""An adapter's config as PEFT writes it."""
ADAPTERS = {
    "lora": f"`python -m lori import {FOLDER} STORE --model own/llama`",
    "embedded": f"`python -m lori import {FOLDER} STORE`",
    "local": f"`python -m lori import {FOLDER} STORE --model BASE`",
    "dora": "cannot be imported: use_dora is True: it changes what the adapter does, and only plain LoRA can be imported",
    "ia3": "peft_type is IA3: it cannot be imported, since only plain LoRA adds B A x to a layer's output",
    "prompt": "peft_type is PROMPT_TUNING: it cannot be imported",
    "pickled": "write it with save_pretrained(folder, safe_serialization=True), and import that",
    "foreign": "or train or import an adapter for the base that is loaded",
}
"""Folders that are no sound adapters of the base, each with a part of the message about it."""
LORA = "`python -m lori import STORE/lora STORE --model own/llama`"
"""The message about the folder `lora` for readers that may see its path."""


def write_lora(folder: Path, base: BaseModel, **changes: Any) -> Path:
    """Write a LoRA as PEFT does, for two projections of `base`, with its own A. `changes` replaces fields of its config."""
    random = torch.Generator().manual_seed(1)
    folder.mkdir(parents=True)
    tensors = {}
    for name, (num_outputs, num_inputs) in base.identity.shapes.items():
        if name.rpartition(".")[2] in CONFIG["target_modules"]:
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, num_inputs, generator=random)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(num_outputs, 4, generator=random)
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG | changes))
    return folder


def pickle_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"x": torch.zeros(1)}, folder / PICKLE_FILE)


def write_wrong_store(place: Path, base: BaseModel, other_base: BaseModel) -> None:
    """Write a store of one sound adapter, calm, and of `ADAPTERS`. `foreign` is an adapter of `other_base`."""
    write_adapter(place / "calm", base, seed=1)
    write_lora(place / "lora", base)
    write_lora(place / "embedded", base, base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct")
    write_lora(place / "local", base, base_model_name_or_path="/home/somebody/it's; a model")
    write_lora(place / "dora", base, use_dora=True)
    for name, kind in (("ia3", "IA3"), ("prompt", "PROMPT_TUNING")):
        write_lora(place / name, base)
        (place / name / CONFIG_FILE).write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": "own/llama"}))
    pickle_weights(write_lora(place / "pickled", base))
    write_adapter(place / "foreign", other_base, seed=2)
