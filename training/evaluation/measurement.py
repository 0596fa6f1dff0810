"""A measurement: the figures, and what they are figures of."""

from collections.abc import Sequence
from dataclasses import dataclass

from lori.template import Template
from training.evaluation.config import EvaluateConfig
from training.evaluation.figures import ROWS, STDERR, Figures, names

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
