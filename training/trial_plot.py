"""The plot of a search for the weights of a merge (the extra `plot`)."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from lori.compare.plots import FONT_SIZE, new_figure, save_figure
from training.weight_search import Trial

WIDTH, HEIGHT = 8.0, 3.4
"""In inches."""


def plot_trials(names: Sequence[str], trials: Sequence[Trial], path: Path) -> None:
    """Draw the score of each trial, and its weights of the adapters `names`, to the file at `path`."""
    figure = new_figure(WIDTH, HEIGHT)
    scores, weights = figure.subplots(1, 2, width_ratios=(1, 1.3))
    values = [trial.score for trial in trials]
    numbers = range(1, len(trials) + 1)
    scores.plot(numbers, values, "o", markersize=4, color="grey", label="a trial")
    scores.plot(numbers, [*accumulate(values, max)], color="C0", label="the best so far")
    scores.set_xlabel("trial")
    scores.set_ylabel("mean share of the gains")
    *others, best = sorted(trials, key=lambda trial: trial.score)
    for rank, trial in enumerate(others):
        weights.plot(range(len(names)), trial.weights, "o-", color=f"{0.9 - 0.6 * rank / len(trials):.2f}", linewidth=0.8)
    weights.plot(range(len(names)), best.weights, "o-", color="C3", linewidth=2, label="the best")
    weights.set_xticks(range(len(names)), names, parse_math=False)
    weights.set_ylabel("weight")
    for axes in (scores, weights):
        axes.tick_params(labelsize=FONT_SIZE)
        axes.legend(fontsize=FONT_SIZE)
    weights.set_title("every trial: darker is better", fontsize=FONT_SIZE)
    save_figure(figure, path)
