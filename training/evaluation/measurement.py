"""A measurement: figures and their settings. `record_measurement` writes it into an adapter's config and card."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori.config import Measured
from lori.format import name_of, read_config, write_record
from lori.names import AUTO
from lori.template import Template
from training.evaluation.config import EvaluateConfig
from training.evaluation.figures import ROWS, STDERR, Figures, names, num_rows
from training.record import render_card

WIDTH = 40
"""Width of the column of names before the values, in characters."""


@dataclass(frozen=True, slots=True)
class MeasuredAdapter:
    """An adapter, or a named merge, that was measured."""

    name: str
    version: str
    """Empty for a merge, which has none."""
    terms: Sequence[str] = ()
    """A merge's adapters: the weights of each, and `name@version`."""

    @property
    def label(self) -> str:
        """The name with the version, or with a merge's terms."""
        return f"{self.name} ({', '.join(self.terms)})" if self.terms else f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures that an evaluation with `config` gave."""

    config: EvaluateConfig
    base: str
    """Readable name of the base, or the address of its server."""
    adapters: Sequence[MeasuredAdapter]
    template: Template
    """The template of the prompts."""
    figures: Figures

    @property
    def subject(self) -> str:
        """The measured adapters with their weights, such as `1 math + 0.8 safety`, or `base`."""
        return self._subject([adapter.name for adapter in self.adapters])

    def _subject(self, adapters: Sequence[str]) -> str:
        weights = [weight if weight == AUTO else f"{weight:g}" for weight in self.config.all_weights]
        terms = (
            [AUTO] if self.config.is_selected else [f"{weight} {name}" for weight, name in zip(weights, adapters, strict=True)]
        )
        used_options = dict(self.config.merge_options.used)
        method = used_options.pop("method")
        options = ", ".join(f"{name} {value}" for name, value in used_options.items())
        return (f"{method} ({options}) of " if options else "") + (" + ".join(terms) or "base")

    @property
    def lines(self) -> list[str]:
        """The measurement as lines: its settings, each figure with its standard error, the numbers of rows."""
        figures = self.figures
        values = {
            "measured": self._subject([adapter.label for adapter in self.adapters]),
            "on": self.base,
            "data": self.config.data_name,
            "template": self.template,
        }
        for name in names(figures):
            error = figures.get(name + STDERR)
            values[name] = f"{figures[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        values |= {name: f"{value:.0f}" for name, value in figures.items() if name.partition("/")[0] == ROWS}
        return [f"{name:{WIDTH}} {value}" for name, value in values.items()]


def record_measurement(folder: Path, measurement: Measurement) -> None:
    """Write the figures and their settings into the adapter in `folder`. Raises as `read_config` and `write_record`."""
    adapter = read_config(folder)
    suffix = " (chat)" if measurement.template == "chat" else ""  # a card has figures of both templates
    keys = {name: f"{measurement.subject}: {name}{suffix}" for name in names(measurement.figures)}
    # Older versions recorded both templates under one key, which is the key of plain prompts now.
    old_keys = {f"{measurement.subject}: {name}" for name in keys} if suffix else set()
    stale = {key for key in old_keys if (entry := adapter.lori.measured.get(key)) and entry.template == "chat"}
    metrics, measured = (
        {key: value for key, value in section.items() if key not in stale}
        for section in (adapter.lori.metrics, adapter.lori.measured)
    )
    changes: dict[str, Any] = {
        "metrics": metrics | {key: round(measurement.figures[name], 4) for name, key in keys.items()},
        "measured": measured | {key: _measured(measurement, name) for name, key in keys.items()},
    }
    partners = [partner.name for partner in measurement.adapters]
    if len(partners) == 2 and partners[0] == name_of(folder) and measurement.config.merge == "linear":
        own, other = (weight for weight in measurement.config.all_weights if weight != "auto")  # with --record none is
        changes["merge_weights"] = adapter.lori.merge_weights | {partners[1]: (own, other)}
    adapter = adapter.model_copy(update={"lori": adapter.lori.model_copy(update=changes)})
    write_record(folder, adapter, render_card(name_of(folder), adapter))


def _measured(measurement: Measurement, name: str) -> Measured:
    error = measurement.figures.get(name + STDERR)
    return Measured(
        num_rows=num_rows(measurement.figures, name),
        stderr=None if error is None else round(error, 4),
        data=measurement.config.data_name,
        template=measurement.template,
        versions={adapter.name: adapter.version for adapter in measurement.adapters},
    )
