"""Writes figures into the config and the card of an adapter."""

from pathlib import Path
from typing import Any

from lori.format import name_of, read_config, write_record
from training.card import render_card
from training.evaluation.config import EvaluateConfig
from training.evaluation.figures import STDERR, Figures


def record(folder: Path, config: EvaluateConfig, result: Figures) -> None:
    """Writes a result, without its errors, into the adapter in `folder`. Raises as `read_config` and `write_record`."""
    adapter = read_config(folder)
    names = [name_of(Path(reference)) for reference in config.adapter]
    weights = config.weights or [1 / len(names) for _ in names]
    who = " + ".join(f"{weight:g} {name}" for weight, name in zip(weights, names, strict=True)) or "base"
    if config.merge != "linear":
        who = f"{config.merge} of {who}"
    figures = {
        f"{who}: {name}": round(value, 4) for name, value in result.items() if name != "rows" and not name.endswith(STDERR)
    }
    changes: dict[str, Any] = {"metrics": adapter.lori.metrics | figures}
    if len(names) == 2 and names[0] == name_of(folder) and config.merge == "linear":
        changes["merge_weights"] = adapter.lori.merge_weights | {names[1]: tuple(weights)}
    adapter = adapter.model_copy(update={"lori": adapter.lori.model_copy(update=changes)})
    write_record(folder, adapter, render_card(name_of(folder), adapter))
