"""An adapter's card, README.md in its folder: written from its config alone, so that the two cannot disagree."""

from collections.abc import Mapping
from typing import Any

from lori.config import AdapterConfig
from lori.names import NUM_VERSION_DIGITS


def render_card(name: str, config: AdapterConfig) -> str:
    """Returns the card of the adapter `name` in Markdown, with the hub's front matter."""
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
        training.get("about", ""),
        "",
        f"{method_of(training)} on {config.base_model_name_or_path}: rank {config.r}, alpha {config.lora_alpha:g}, "
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
        lines += ["", "## Measured on held-out rows", "| who | what | figure |", "|---|---|---|"]
        lines += [f"| {who} | {what} | {value:.3f} |" for (who, what), value in _figures(lori.metrics)]
    if lori.merge_weights:
        lines += ["", "## Weights for merges", "| with | own weight | its weight |", "|---|---|---|"]
        lines += [f"| {partner} | {own:g} | {other:g} |" for partner, (own, other) in sorted(lori.merge_weights.items())]
    return "\n".join(lines) + "\n"


def method_of(training: Mapping[str, Any]) -> str:
    """Returns what a person calls the method of a training's record."""
    names = {"lori-d": "LoRI-D (arXiv 2504.07448, all of B)", "lora": "LoRA (PEFT's)"}
    return names.get(training.get("method", "lori"), "LoRI (arXiv 2504.07448)")


def _phases(training: dict[str, object]) -> list[str]:
    phases = training.get("phases")
    if not isinstance(phases, dict):
        return []
    versions = training.get("versions")
    made_with = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""
    rows = [f"| {name} | {p['steps']} | {p['tokens']} | {p['loss']:.3f} |" for name, p in phases.items()]
    return [
        f"Seed {training.get('seed')}; {training.get('seconds')} s, {training.get('threads')} CPU thread(s); {made_with}.",
        "",
        "| phase | steps | tokens | loss at the end |",
        "|---|---|---|---|",
        *rows,
    ]


def _figures(metrics: dict[str, float]) -> list[tuple[tuple[str, str], float]]:
    split = [
        ((who or what, what if who else ""), value) for key, value in metrics.items() for who, _, what in [key.partition(": ")]
    ]
    return sorted(split, key=lambda row: (row[0][1], row[0][0] != "base", row[0][0]))
