"""The page of a study: tables and plots of means and, for several seeds, their spread."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lori.compare.plots import FONT_SIZE, new_figure, save_figure
from lori.store.files import replace_file
from training.study.claims import Result
from training.study.config import Claim, StudyConfig, TaskConfig
from training.study.scores import LEAST_GAIN, Scores, columns_of, format_scores, gains_kept, methods_of, scores_of, spread

WIDTH, HEIGHT = 3.0, 2.8
"""Size of one set of axes, in inches."""
LETTER = 0.055
"""Height that a letter of a slanted label takes, in inches."""


def plot_bars(scores: Scores, columns: Sequence[str]) -> Figure:
    """Return bars of the means with their spread, one for each method and setting; one set of axes for each of `columns`."""
    labels = list(dict.fromkeys((what, setting) for what, setting, _ in scores))
    texts = [", ".join(filter(None, label)) for label in labels]
    figure = new_figure(WIDTH * len(columns), HEIGHT + LETTER * max(map(len, texts)))
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        bars = [(text, scores[*label, column]) for text, label in zip(texts, labels, strict=True) if (*label, column) in scores]
        means, spreads = [statistics.fmean(v) for _, v in bars], [spread(v) for _, v in bars]
        axes.bar(range(len(bars)), means, yerr=spreads, capsize=3, color=[f"C{i}" for i in range(len(bars))])
        axes.set_xticks(range(len(bars)), [text for text, _ in bars], rotation=45, ha="right", rotation_mode="anchor")
        _set_title(axes, column)
    return figure


def plot_lines(scores: Scores, columns: Sequence[str], xlabel: str) -> Figure:
    """Return a line over the settings, which are numbers, for each method; one set of axes for each of `columns`."""
    figure = new_figure(WIDTH * len(columns), HEIGHT)
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        for what in methods_of(scores):
            points = [(float(setting), values) for (w, setting, c), values in scores.items() if (w, c) == (what, column)]
            _plot_line(axes, points, what)
        axes.set_xlabel(xlabel)
        _set_title(axes, column)
    return figure


def plot_gains(kept_gains: Scores) -> Figure:
    """Return the mean share of the tasks' gains that is kept in a merge, by weight; one set of axes for each set of tasks.

    Linear merges have a line for each kind of adapter, the other merge methods one line each. Tasks whose adapters gained nothing
    alone are not in the mean. Shares below -0.6 or above 1.15 are outside of the axes. `kept_gains` must not be empty.
    """
    sets = list(dict.fromkeys(setting.split(", ")[0] for _, setting, _ in kept_gains))
    num_columns = min(3, len(sets))
    num_rows = -(-len(sets) // num_columns)
    figure = new_figure(1.3 * WIDTH * num_columns, HEIGHT * num_rows + 0.8)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flatten()
    for axes, tasks in zip(grid, sets, strict=False):
        for label, points in _by_weight(kept_gains, tasks).items():
            _plot_line(axes, points, label)
        axes.set_xlabel("weight of each")
        axes.set_ylim(-0.6, 1.15)
        axes.axhline(1.0, color="grey", linewidth=0.5)
        _set_title(axes, tasks)
    for axes in grid[len(sets) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=FONT_SIZE)
    return figure


def _by_weight(kept_gains: Scores, tasks: str) -> dict[str, list[tuple[float, list[float]]]]:
    """Return the lines for one set of tasks: by label, points of (weight, mean over the tasks for each seed)."""
    groups: dict[tuple[str, str], list[list[float]]] = {}
    for (what, setting, _), values in kept_gains.items():
        if setting.split(", ")[0] == tasks:
            groups.setdefault((what, setting), []).append(values)
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for (what, setting), by_task in groups.items():
        _, method, weight = setting.split(", ")
        label = what if method == "linear" else method
        lines.setdefault(label, []).append((float(weight), [statistics.fmean(seed) for seed in zip(*by_task, strict=True)]))
    return lines


def _plot_line(axes: Axes, points: Sequence[tuple[float, Sequence[float]]], label: str) -> None:
    points = sorted(points)
    means, spreads = [statistics.fmean(values) for _, values in points], [spread(values) for _, values in points]
    axes.errorbar([x for x, _ in points], means, yerr=spreads, marker="o", markersize=4, capsize=3, label=label)


def _set_title(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)


TITLES: Mapping[Claim, str] = {
    "single": "Each task alone, at the same tokens in each phase",
    "merges": "Merges",
    "continual": "Safety first, then a task",
    "sparsity": "LoRI-S by the share of B that is left out",
    "granularity": "LoRI-S by what the mask's entries are ranked against",
}


def write_page(config: StudyConfig, results: Mapping[Claim, Sequence[Sequence[Result]]]) -> Path:
    """Write study.md, its plots, and study.json with all figures into the output. Return the path of study.md."""
    parts = [f"# {title(len(config.seeds))}", _setting(config)]
    for claim, seeds in results.items():
        scores = scores_of(seeds, config.tasks)
        parts.append(f"## {TITLES[claim]}")
        if figure := draw(claim, scores, config.tasks):
            save_figure(figure, config.output / f"{claim}.png")
            parts.append(f"![{claim}]({claim}.png)")
        parts += tables(claim, scores, config.tasks)
    page = config.output / "study.md"
    replace_file(page, ("\n\n".join(parts) + "\n").encode())
    data = {claim: [[asdict(result) for result in seed] for seed in seeds] for claim, seeds in results.items()}
    replace_file(config.output / "study.json", json.dumps(data).encode())
    return page


def title(num_seeds: int) -> str:
    """Return the title of a page, which says what its figures are."""
    return "Mean ± spread (standard deviation) over the seeds" if num_seeds > 1 else "Figures of one seed, without a spread"


def _setting(config: StudyConfig) -> str:
    seeds = f"Seed{'s' if len(config.seeds) > 1 else ''} {', '.join(map(str, config.seeds))}"
    return (
        f"{seeds}; {config.model or 'the embedded model'}, {config.dtype}; rank {config.rank}, "
        f"alpha {config.alpha}; {config.steps} steps of {config.batch_tokens} tokens a phase, so LoRI-S has had LoRI-D's, too, "
        f"but where its mask is within the budget; learning rates {config.lora_lr:g} (LoRA), {config.calibration_lr:g} (LoRI-D), "
        f"{config.lr:g} (LoRI-S); measured on {config.num_rows} rows of each task, merges on {config.num_merge_rows}."
    )


def draw(claim: Claim, scores: Scores, tasks: Mapping[str, TaskConfig]) -> Figure | None:
    """Return the plot of a claim; None if there is nothing to plot."""
    if claim == "merges":
        kept_gains = gains_kept(scores, tasks)
        return plot_gains(kept_gains) if kept_gains else None
    columns = columns_of(scores)
    return plot_lines(scores, columns, "left out") if claim == "sparsity" else plot_bars(scores, columns)


def tables(claim: Claim, scores: Scores, tasks: Mapping[str, TaskConfig]) -> list[str]:
    """Return the tables of a claim. For merges, a table of the kept gains comes before the scores."""
    if claim != "merges":
        return [table(scores)]
    kept_gains = gains_kept(scores, tasks)
    caption = (
        "The share of an adapter's gain over the base that is kept in the merge (1: all of it, 0: as the base), where it gained "
    )
    shares = [f"{caption}{LEAST_GAIN} or more alone, with each seed:", table(kept_gains)] if kept_gains else []
    return [*shares, "The scores themselves:", table(scores)]


def table(scores: Scores) -> str:
    """Return a Markdown table with a row for each method and setting, and a column for each figure."""
    columns = columns_of(scores)
    lines = [f"| | | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for what, setting in dict.fromkeys((what, setting) for what, setting, _ in scores):
        cells = [format_scores(scores.get((what, setting, column), ())) for column in columns]
        lines.append(f"| {what} | {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)
