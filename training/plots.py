"""Pictures of a run, with matplotlib (the extra `plot`)."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lori.compare.plots import FONT_SIZE, new_figure
from training.outcome import Outcome

WIDTH, HEIGHT = 4.2, 3.0
"""Of one set of axes, in inches."""
SMOOTHED = 0.1
"""The share of a phase's steps over which its curve is a running mean."""


def plot_losses(outcomes: Mapping[str, Outcome]) -> Figure:
    """Returns the loss of each phase by step: as it was, its running mean, and what was measured on held-out rows."""
    figure = new_figure(WIDTH * len(outcomes), HEIGHT)
    for axes, (phase, outcome) in zip(figure.subplots(1, len(outcomes), squeeze=False)[0], outcomes.items(), strict=True):
        steps = np.arange(1, len(outcome.losses) + 1)
        axes.plot(steps, outcome.losses, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(steps, running_mean(outcome.losses), color="tab:blue", label="training")
        if outcome.held_out:
            axes.plot(*zip(*outcome.held_out, strict=True), "o-", color="tab:orange", label="held out")
            axes.axvline(outcome.best_step, color="tab:orange", linestyle=":", label="kept")
        axes.set_title(phase, fontsize=FONT_SIZE)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(frameon=False, fontsize=FONT_SIZE)
    return figure


def running_mean(values: Sequence[float]) -> list[float]:
    """Returns the mean of each value with those before it, `SMOOTHED` of them all."""
    width = max(1, round(SMOOTHED * len(values)))
    return [float(np.mean(values[max(0, i - width + 1) : i + 1])) for i in range(len(values))]


def as_svg(figure: Figure) -> str:
    """Returns a figure as an element of an HTML page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
