"""The training record of an adapter, in its config, and the adapter's card, README.md in its folder.

The card is rendered from the config alone, so the two cannot disagree.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from lori.config import AdapterConfig, LoriSection, new_config
from lori.identity import BaseIdentity
from lori.names import NUM_VERSION_DIGITS
from training.config import FitConfig
from training.methods import TrainedWeights
from training.phase import Outcome
from training.processes import processes


def render_card(name: str, config: AdapterConfig) -> str:
    """Return the card of the adapter `name` in Markdown, with front matter for the hub."""
    lori = config.lori
    training = lori.training
    lines = [
        "---",
        f"base_model: {config.base_model_name_or_path}",
        "library_name: lori-server",
        "tags: [lori, lora, peft]",
        "---",
        f"# {name}",
        "",
        *([about, ""] if (about := training.get("about")) else []),
        f"{method_name(training)} on {config.base_model_name_or_path}: rank {config.r}, alpha {config.lora_alpha:g}, "
        f"{1 - lori.sparsity:.0%} of B kept, basis {lori.basis}. "
        f"Version `{lori.content_digest[:NUM_VERSION_DIGITS]}`. Trained on the template {' and '.join(lori.templates)}.",
        "",
        "## Trained by",
        "```bash",
        *training.get("prepare", []),
        training.get("command", ""),
        "```",
        *_phases(training),
    ]
    if lori.metrics:
        lines += ["", "## Measured by `training.evaluate`", *_measured(lori)]
    if lori.merge_weights:
        lines += ["", "## Weights for merges", "| with | own weight | its weight |", "|---|---|---|"]
        lines += [
            f"| {partner} | {weight:g} | {partner_weight:g} |"
            for partner, (weight, partner_weight) in sorted(lori.merge_weights.items())
        ]
    return "\n".join(lines) + "\n"


def method_name(training: Mapping[str, Any]) -> str:
    """Return the readable name of the method of a training record."""
    names = {"lori-d": "LoRI-D (arXiv 2504.07448, all of B)", "lora": "LoRA (PEFT's)"}
    return names.get(training.get("method", "lori"), "LoRI (arXiv 2504.07448)")


def _phases(training: dict[str, object]) -> list[str]:
    phases = training.get("phases")
    if not isinstance(phases, dict):
        return []
    versions = training.get("versions")
    version_list = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""
    rows = [f"| {name} | {p['steps']} | {p['tokens']} | {p['loss']:.3f} |" for name, p in phases.items()]
    return [
        f"Seed {training.get('seed')}; {training.get('seconds')} s, {training.get('threads')} CPU thread(s); {version_list}.",
        "",
        "| phase | steps | tokens | loss at the end |",
        "|---|---|---|---|",
        *rows,
    ]


def _measured(lori: LoriSection) -> list[str]:
    """Return a table of the figures, with columns for their measurement if the measurement of any figure is known."""
    if not lori.measured:
        head, note = ["who", "what", "figure"], []
    else:
        head = ["who", "what", "figure ± standard error", "rows", "data", "template", "versions"]
        note = ["A standard error says how far a figure may lie from that of all such rows; next to 0 and 1 it is too small.", ""]
    lines = [*note, _row(head), "|" + "---|" * len(head)]
    for key in sorted(lori.metrics, key=_sort_key):
        subject, _, figure = key.partition(": ")
        cells = [subject, figure, f"{lori.metrics[key]:.3f}", "", "", "", ""]
        if entry := lori.measured.get(key):
            cells[2] += f" ± {entry.stderr:.3f}" if entry.stderr is not None else ""
            cells[3:] = [
                str(entry.num_rows),
                entry.data,
                entry.template,
                ", ".join(f"{k}@{v}" for k, v in entry.versions.items()),
            ]
        lines.append(_row(cells[: len(head)]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _sort_key(key: str) -> tuple[str, bool, str]:
    subject, _, figure = key.partition(": ")
    return figure, subject != "base", subject


def config_of(
    config: FitConfig,
    base: BaseIdentity,
    weights: TrainedWeights,
    outcomes: Mapping[str, Outcome],
    run_facts: Mapping[str, Any],
) -> AdapterConfig:
    """Return the config of a trained adapter, without the digests, which `lori.format.seal` fills in.

    `run_facts` are added to the training record as they are.
    """
    modules, basis = weights
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
        training=record | dict(run_facts) | machine | {"phases": phases, "versions": versions},
    )
