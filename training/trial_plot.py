"""The plot of a descent on the weights of a merge (the extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path

from lori.compare.plots import FONT_SIZE, new_figure, save_figure
from training.weight_trials import Trial, best_of, split_blocks

WIDTH, HEIGHT = 8.0, 3.4
"""In inches."""


def plot_trials(names: Sequence[str], num_blocks: int, trials: Sequence[Trial], path: Path) -> None:
    """Draw the score of each trial, and the best weights of the adapters `names`, to the file at `path`."""
    figure = new_figure(WIDTH, HEIGHT)
    scores, weights = figure.subplots(1, 2, width_ratios=(1, 1.3))
    starts, later = [trial for trial in trials if not trial.step], [trial for trial in trials if trial.step]
    scores.plot([0] * len(starts), [trial.score for trial in starts], "o", markersize=4, color="grey", label="tried first")
    scores.plot(
        [trial.step for trial in later], [trial.score for trial in later], "o-", markersize=4, color="C0", label="descent"
    )
    scores.set_xlabel("step")
    scores.set_ylabel("mean share of the gains")
    scores.set_title("on held-out rows", fontsize=FONT_SIZE)
    blocks = split_blocks(best_of(trials).weights, num_blocks)
    if num_blocks == 1:
        weights.bar(range(len(names)), [weight for [weight] in blocks])
        weights.set_xticks(range(len(names)), names, parse_math=False)
    else:
        edges = [i + 0.5 for i in range(num_blocks + 1)]
        for i, block_weights in enumerate(blocks):
            weights.stairs(block_weights, edges, baseline=None, linewidth=2, color=f"C{i}")
        weights.legend(names, fontsize=FONT_SIZE)
        weights.set_xlabel("block of layers")
    weights.set_ylabel("weight")
    weights.set_title("the best weights", fontsize=FONT_SIZE)
    scores.legend(fontsize=FONT_SIZE)
    for axes in (scores, weights):
        axes.tick_params(labelsize=FONT_SIZE)
    save_figure(figure, path)
