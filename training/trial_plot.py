"""The plot of a descent on the weights of a merge (the extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lori.compare.plots import FONT_SIZE, NUMBER_SIZE, new_figure, save_figure
from training.weight_trials import Trial, Weights, best_of, split_blocks

WIDTH, HEIGHT = 9.0, 4.0
"""In inches."""
MARKERS = "sD^vP<>X*p"
"""Markers of the weights tried before the descent. If there are more weights than markers, all share one marker and one label."""
CHOSEN_COLOUR = "C3"
"""Of the ring around the weights with the best score."""
MAX_HORIZONTAL_NAMES = 6
"""Maximum number of adapters whose names are written horizontally."""


def plot_trials(title: str, names: Sequence[str], num_blocks: int, trials: Sequence[Trial], path: Path) -> None:
    """Draw the score of each trial, and the best weights of the adapters `names`, to the file at `path`."""
    figure = new_figure(WIDTH, HEIGHT)
    figure.suptitle(title, fontsize=FONT_SIZE + 1, parse_math=False)
    scores, weights = figure.subplots(1, 2, width_ratios=(1, 1.3))
    _plot_scores(scores, names, num_blocks, trials)
    _plot_weights(weights, names, split_blocks(best_of(trials).weights, num_blocks))
    for axes in (scores, weights):
        axes.tick_params(labelsize=FONT_SIZE)
    save_figure(figure, path)


def _plot_scores(axes: Axes, names: Sequence[str], num_blocks: int, trials: Sequence[Trial]) -> None:
    starts, later = [trial for trial in trials if not trial.step], [trial for trial in trials if trial.step]
    if len(starts) <= len(MARKERS):
        for trial, marker in zip(starts, MARKERS, strict=False):
            axes.plot(0, trial.score, marker, markersize=5, color="grey", label=_label(names, trial.weights[::num_blocks]))
    else:
        axes.plot([0] * len(starts), [trial.score for trial in starts], "s", markersize=5, color="grey", label="tried first")
    axes.plot([trial.step for trial in later], [trial.score for trial in later], "o-", markersize=4, color="C0", label="descent")
    best = best_of(trials)
    axes.plot(best.step, best.score, "o", markersize=11, fillstyle="none", color=CHOSEN_COLOUR, label=f"chosen: {best.score:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("mean share of the gains")
    axes.set_title("on held-out rows", fontsize=FONT_SIZE)
    _add_legend(axes, NUMBER_SIZE)


def _label(names: Sequence[str], weights: Weights) -> str:
    """Return what people call the weights: those of one adapter alone, or equal ones."""
    if len({*weights}) == 1:
        return f"{weights[0]:g} each"
    return " + ".join(f"{name} alone" for name, weight in zip(names, weights, strict=True) if weight)


def _plot_weights(axes: Axes, names: Sequence[str], blocks: Sequence[Weights]) -> None:
    num_blocks = len(blocks[0])
    if num_blocks == 1:
        bars = axes.bar(range(len(names)), [weight for [weight] in blocks], color=[f"C{i}" for i in range(len(names))])
        axes.bar_label(bars, fmt="%.2f", fontsize=FONT_SIZE)
        axes.margins(y=0.12)
        axes.set_xticks(range(len(names)), names, parse_math=False, rotation=90 if len(names) > MAX_HORIZONTAL_NAMES else 0)
    else:
        edges = [i + 0.5 for i in range(num_blocks + 1)]
        for i, block_weights in enumerate(blocks):
            axes.stairs(block_weights, edges, baseline=None, linewidth=2, color=f"C{i}", label=names[i])
        _add_legend(axes, FONT_SIZE)
        axes.set_xlabel("block of layers")
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_ylabel("weight")
    axes.set_title("the chosen weights", fontsize=FONT_SIZE)


def _add_legend(axes: Axes, font_size: float) -> None:
    for text in axes.legend(fontsize=font_size, labelspacing=0.6).get_texts():
        text.set_parse_math(False)  # a dollar sign of a name is one
