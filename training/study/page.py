"""What a study found, as tables: mean and spread over the seeds."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lori.durable import replace_file
from training.study.claims import Found
from training.study.config import Claim, StudyConfig

Key = tuple[str, str, str]


def gathered(seeds: Sequence[Sequence[Found]], figure: Mapping[str, str]) -> dict[Key, list[float]]:
    """Returns the scores by (what, setting, task), one of each seed; `figure` says which figure is a task's score."""
    scores: dict[Key, list[float]] = {}
    for found in (one for seed in seeds for one in seed):
        scores.setdefault((found.what, found.setting, found.task), []).append(found.figures[figure[found.task]])
    return scores


def shown(values: Sequence[float]) -> str:
    """Returns mean ± spread (the standard deviation over seeds)."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def table(scores: Mapping[Key, Sequence[float]]) -> str:
    """Returns a Markdown table: a row for what and setting, a column for each task."""
    tasks = list(dict.fromkeys(task for _, _, task in scores))
    rows = list(dict.fromkeys((what, setting) for what, setting, _ in scores))
    lines = [f"| | | {' | '.join(tasks)} |", "|---|---|" + "---|" * len(tasks)]
    for what, setting in rows:
        cells = [shown(scores[what, setting, task]) if (what, setting, task) in scores else "" for task in tasks]
        lines.append(f"| {what} | {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page(config: StudyConfig, found: Mapping[Claim, Sequence[Sequence[Found]]]) -> Path:
    """Writes study.md and study.json into the output, and returns the first."""
    figure = {name: task.figure for name, task in config.tasks.items()}
    parts = [f"# {len(config.seeds)} seeds, {config.steps} steps of {config.batch_tokens} tokens a phase\n"]
    for claim, seeds in found.items():
        parts.append(f"## {claim}\n\n{table(gathered(seeds, figure))}\n")
    page = config.output / "study.md"
    replace_file(page, "\n".join(parts).encode())
    told = {claim: [[asdict(one) for one in seed] for seed in seeds] for claim, seeds in found.items()}
    replace_file(config.output / "study.json", json.dumps(told, indent=1).encode())
    return page
