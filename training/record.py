"""What an adapter's config and card say of the run that made it."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from lori.config import AdapterConfig, new_config
from lori.identity import BaseIdentity
from training.config import FitConfig
from training.methods import Trained
from training.outcome import Outcome
from training.processes import processes


def config_of(
    config: FitConfig, base: BaseIdentity, trained: Trained, outcomes: Mapping[str, Outcome], told: Mapping[str, Any]
) -> AdapterConfig:
    """Returns the config of an adapter; `told` goes into its record as it is. `lori.format.seal` fills in its digests."""
    modules, basis = trained
    record = config.model_dump(mode="json", exclude={"output", "resume", "save_every"}) | {"lr": config.peak_lr}
    phases = {
        name: {
            "steps": len(outcome.losses),
            "tokens": outcome.num_tokens,
            "loss": round(outcome.recent_loss, 4),
            "best_step": outcome.best_step,
            "held_out": [[int(step), round(loss, 4)] for step, loss in outcome.held_out],
        }
        for name, outcome in outcomes.items()
    }
    versions = {name: version(name) for name in ("lori-server", "torch", "transformers", "accelerate")}
    machine = {"threads": torch.get_num_threads(), "processes": int(processes().num_processes)}
    return new_config(
        modules,
        basis,
        base,
        alphas=dict.fromkeys(modules, config.alpha),
        target_modules=config.target_modules,
        values=config.values,
        templates=config.template,
        training=record | dict(told) | machine | {"phases": phases, "versions": versions},
    )
