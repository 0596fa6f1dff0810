"""A picture of the simulation, with matplotlib (the extra `plot`)."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from lori.compare.plots import FONT_SIZE, new_figure
from server.plan.simulation import POLICIES, Outcome

WIDTH, HEIGHT = 3.4, 2.8
"""Size of one set of axes, in inches."""


def plot_outcomes(outcomes: Sequence[Outcome]) -> Figure:
    """Return hits, cold loads and waits by the number of replicas, with a line for each routing policy."""
    parts = {
        "resident adapters hit (%)": [100 * outcome.hit_rate for outcome in outcomes],
        "cold loads/s": [outcome.loads_per_s for outcome in outcomes],
        "p99 wait for the first step (ms)": [1e3 * outcome.p99_wait_s for outcome in outcomes],
    }
    figure = new_figure(WIDTH * len(parts), HEIGHT)
    for axes, (title, values) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
        for policy in POLICIES:
            points = [
                (outcome.num_replicas, value) for outcome, value in zip(outcomes, values, strict=True) if outcome.policy == policy
            ]
            axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=policy)
        axes.set_title(title, fontsize=FONT_SIZE)
        axes.set_xlabel("replicas")
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=FONT_SIZE)
        axes.legend(frameon=False, fontsize=FONT_SIZE)
    return figure
