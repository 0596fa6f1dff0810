"""A measurement: figures and their setting, written into an adapter's config and card on request."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori.config import Measured
from lori.format import name_of, read_config, write_record
from lori.template import Template
from training.evaluation.config import EvaluateConfig
from training.evaluation.figures import ROWS, STDERR, Figures, names, num_rows
from training.record import render_card

WIDTH = 40
"""Characters before a value."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """An adapter that was measured: its name and its version."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """What `config` asked for, and what was found."""

    config: EvaluateConfig
    base: str
    """The base as a person would say it, or where the server is that has it."""
    adapters: Sequence[Adapted]
    template: Template
    """How prompts were written."""
    figures: Figures

    @property
    def who(self) -> str:
        """What was measured, by names and weights: `1 math + 0.8 safety`, or `base`."""
        return self._who([adapter.name for adapter in self.adapters])

    def _who(self, adapters: Sequence[str]) -> str:
        terms = [f"{weight:g} {name}" for weight, name in zip(self.config.all_weights, adapters, strict=True)]
        used = dict(self.config.merge_options.used)
        method = used.pop("method")
        how = ", ".join(f"{name} {value}" for name, value in used.items())
        return (f"{method} ({how}) of " if how else "") + (" + ".join(terms) or "base")

    @property
    def lines(self) -> list[str]:
        """What was measured, then a line for each figure, its standard error beside it, then the rows."""
        figures = self.figures
        told = {
            "measured": self._who([f"{adapter.name}@{adapter.version}" for adapter in self.adapters]),
            "on": self.base,
            "data": self.config.data_name,
            "template": self.template,
        }
        for name in names(figures):
            error = figures.get(name + STDERR)
            told[name] = f"{figures[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        told |= {name: f"{value:.0f}" for name, value in figures.items() if name.partition("/")[0] == ROWS}
        return [f"{name:{WIDTH}} {value}" for name, value in told.items()]


def record(folder: Path, found: Measurement) -> None:
    """Write what was found, and how, into the adapter in `folder`. Raises as `read_config` and `write_record`."""
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
