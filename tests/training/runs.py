"""Runs of `training.fit` with few steps: their configs, their prompts, their adapters, and interruptions."""

import hashlib
import random
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lori.format import load_adapter
from lori.sparse import SparseB
from training.config import FitConfig
from training.fit import fit
from training.trainer import PhaseTrainer

FIELDS: Mapping[str, object] = {
    "mix_fraction": 0.2, "steps": 6, "rank": 4, "alpha": 8, "batch_tokens": 200, "dtype": "float32", "save_every": 2,
    "template": ["plain"],
}  # fmt: skip


def random_texts(count: int, letters: str = string.ascii_lowercase, seed: int = 0) -> list[str]:
    rng = random.Random(f"{letters} {seed}")
    return ["".join(rng.choices(letters, k=rng.randint(8, 24))) for _ in range(count)]


def config_for(tiny_model: Path, rows: Path, output: Path, **changes: object) -> FitConfig:
    paths = {"data": [str(rows)], "mix": [str(rows)], "model": str(tiny_model), "output": output}
    fields = {**FIELDS, **paths, **changes}
    if not fields["mix"]:
        del fields["mix_fraction"]
    if {"held_out", "held_out_fraction"} & fields.keys():
        fields.pop("save_every", None)
    return FitConfig.model_validate(fields)


def flags_for(tiny_model: Path, rows: Path, output: Path, **changes: object) -> list[str]:
    """Return the command line of the config that `config_for` returns."""
    config = config_for(tiny_model, rows, output, **changes).model_dump(exclude_unset=True)
    flags = []
    for name, value in config.items():
        for item in value if isinstance(value, list) else [value]:
            flag = f"--{name.replace('_', '-')}"
            flags += [flag] if item is True else [flag, str(item)]
    return flags


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def modules_of(folder: Path) -> Mapping[str, SparseB]:
    return load_adapter(folder).modules


def cut_before_the_end(config: FitConfig, at_step: int) -> None:
    """Interrupt a run in its step `at_step`, counted over both phases."""
    steps = 0
    compute_loss = PhaseTrainer.compute_loss

    def die(self: PhaseTrainer, *arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == at_step:
            raise KeyboardInterrupt
        return compute_loss(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseTrainer, "compute_loss", die)
        with pytest.raises(KeyboardInterrupt):
            fit(config, "command")
