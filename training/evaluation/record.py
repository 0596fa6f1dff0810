"""Writes figures into the config and the card of an adapter."""

from pathlib import Path
from typing import Any

from lori.config import Measured
from lori.format import name_of, read_config, write_record
from training.card import render_card
from training.evaluation.figures import STDERR, names, num_rows
from training.evaluation.measurement import Measurement


def record(folder: Path, found: Measurement) -> None:
    """Writes what was found, and how, into the adapter in `folder`. Raises as `read_config` and `write_record`."""
    adapter = read_config(folder)
    form = " (chat)" if found.template == "chat" else ""  # both forms stand in a card, beside each other
    keys = {name: f"{found.who}: {name}{form}" for name in names(found.figures)}
    # What was recorded of chats when both forms had one key, which is that of plain prompts now.
    old = {f"{found.who}: {name}" for name in keys} if form else set()
    stale = {key for key in old if (how := adapter.lori.measured.get(key)) and how.template == "chat"}
    metrics, measured = (
        {key: value for key, value in of.items() if key not in stale} for of in (adapter.lori.metrics, adapter.lori.measured)
    )
    changes: dict[str, Any] = {
        "metrics": metrics | {key: round(found.figures[name], 4) for name, key in keys.items()},
        "measured": measured | {key: _how(found, name) for name, key in keys.items()},
    }
    partners = [one.name for one in found.adapters]
    if len(partners) == 2 and partners[0] == name_of(folder) and found.config.merge == "linear":
        changes["merge_weights"] = adapter.lori.merge_weights | {partners[1]: tuple(found.config.all_weights)}
    adapter = adapter.model_copy(update={"lori": adapter.lori.model_copy(update=changes)})
    write_record(folder, adapter, render_card(name_of(folder), adapter))


def _how(found: Measurement, name: str) -> Measured:
    error = found.figures.get(name + STDERR)
    return Measured(
        num_rows=num_rows(found.figures, name),
        stderr=None if error is None else round(error, 4),
        data=found.config.data_name,
        template=found.template,
        versions={adapter.name: adapter.version for adapter in found.adapters},
    )
