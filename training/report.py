"""The report of a run: loss curves, the mask's density by module, answers before and after. One self-contained HTML file."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from lori.adapter import Adapter
from lori.compare.plots import FONT_SIZE, new_figure, plot_statistics
from lori.compare.statistics import statistics, total
from lori.names import NUM_VERSION_DIGITS
from lori.store.files import replace_file
from training.phase import Outcome
from training.record import method_name
from training.samples import Sample

WIDTH, HEIGHT = 4.2, 3.0
"""Size of one set of axes, in inches."""
SMOOTHING = 0.1
"""Window of the loss curve's running mean, as a fraction of the phase's steps."""


def plot_losses(outcomes: Mapping[str, Outcome]) -> Figure:
    """Return the loss curves of each phase: the loss of each step, its running mean, and the held-out loss."""
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
    """Return the running mean of `values` over a window of the fraction `SMOOTHING` of all values."""
    width = max(1, round(SMOOTHING * len(values)))
    return [float(np.mean(values[max(0, i - width + 1) : i + 1])) for i in range(len(values))]


def as_svg(figure: Figure) -> str:
    """Return a figure as an SVG element for an HTML page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_report(path: Path, adapter: Adapter, outcomes: Mapping[str, Outcome], samples: Sequence[Sample]) -> None:
    """Write the report of the run that trained `adapter` to `path`."""
    modules = statistics(adapter)
    record = adapter.config.lori.training
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("report.html").render(
        name=adapter.name,
        about=record["about"],
        method=method_name(record),
        base=adapter.config.base_model_name_or_path,
        rank=adapter.config.r,
        nnz=total(modules).num_kept,
        num_entries=total(modules).num_entries,
        version=adapter.config.lori.content_digest[:NUM_VERSION_DIGITS],
        command=record["command"],
        losses=Markup(as_svg(plot_losses(outcomes))),
        phases=[_phase_row(name, outcome) for name, outcome in outcomes.items()],
        has_held_out=any(outcome.held_out for outcome in outcomes.values()),
        mix_fraction=record["mix_fraction"] if record["mix"] else 0,
        skipped=record["skipped"],
        statistics=Markup(as_svg(plot_statistics(adapter.name, modules))),
        samples=samples,
        samples_from="held-out rows" if record["held_out"] or record["held_out_fraction"] else "rows that were learnt",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def _phase_row(name: str, outcome: Outcome) -> dict[str, object]:
    best = next((evaluation for evaluation in outcome.held_out if evaluation[0] == outcome.best_step), None)
    steps, loss = len(outcome.losses), outcome.recent_loss
    return {"name": name, "steps": steps, "tokens": outcome.num_tokens, "loss": loss, "best": best}
