"""What a study found, written down: tables of means and, of several seeds, their spread, and plots."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from lori.compare.plots import save_figure
from lori.store.files import replace_file
from training.study.claims import Found
from training.study.config import Claim, StudyConfig, TaskConfig
from training.study.plots import plot_bars, plot_gains, plot_lines
from training.study.scores import LEAST_GAIN, Scores, columns_of, gains_kept, scores_of, shown

TITLES: Mapping[Claim, str] = {
    "single": "Each task alone, at the same tokens in each phase",
    "merges": "Merges",
    "continual": "Safety first, then a task",
    "sparsity": "LoRI-S by the share of B that is left out",
    "granularity": "LoRI-S by what the mask's entries are ranked against",
}


def write_page(config: StudyConfig, found: Mapping[Claim, Sequence[Sequence[Found]]]) -> Path:
    """Writes study.md, its plots, and all figures in study.json into the output, and returns the first."""
    parts = [f"# {title(len(config.seeds))}", _setting(config)]
    for claim, seeds in found.items():
        scores = scores_of(seeds, config.tasks)
        parts.append(f"## {TITLES[claim]}")
        if figure := draw(claim, scores, config.tasks):
            save_figure(figure, config.output / f"{claim}.png")
            parts.append(f"![{claim}]({claim}.png)")
        parts += tables(claim, scores, config.tasks)
    page = config.output / "study.md"
    replace_file(page, ("\n\n".join(parts) + "\n").encode())
    told = {claim: [[asdict(one) for one in seed] for seed in seeds] for claim, seeds in found.items()}
    replace_file(config.output / "study.json", json.dumps(told, indent=1).encode())
    return page


def title(num_seeds: int) -> str:
    """Returns what the figures of a page are."""
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
    """Returns the picture of a claim, where there is something to be drawn."""
    if claim == "merges":
        kept = gains_kept(scores, tasks)
        return plot_gains(kept) if kept else None
    columns = columns_of(scores)
    return plot_lines(scores, columns, "left out") if claim == "sparsity" else plot_bars(scores, columns)


def tables(claim: Claim, scores: Scores, tasks: Mapping[str, TaskConfig]) -> list[str]:
    """Returns a claim's tables; of merges, what is kept of the gains stands before the scores."""
    if claim != "merges":
        return [table(scores)]
    kept = gains_kept(scores, tasks)
    said = (
        "The share of an adapter's gain over the base that is kept in the merge (1: all of it, 0: as the base), where it gained "
    )
    shares = [f"{said}{LEAST_GAIN} or more alone, with each seed:", table(kept)] if kept else []
    return [*shares, "The scores themselves:", table(scores)]


def table(scores: Scores) -> str:
    """Returns a Markdown table: a row for what and setting, a column for each figure."""
    columns = columns_of(scores)
    lines = [f"| | | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for what, setting in dict.fromkeys((what, setting) for what, setting, _ in scores):
        cells = [shown(scores.get((what, setting, column), ())) for column in columns]
        lines.append(f"| {what} | {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)
