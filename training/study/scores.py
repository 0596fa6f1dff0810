"""Figures of several seeds as numbers to compare: scores, their spread, and the share of a gain that a merge keeps."""

import statistics
from collections.abc import Mapping, Sequence

from training.study.claims import ALONE, BASE, Found
from training.study.config import TaskConfig

Key = tuple[str, str, str]
"""What was measured, at which setting, in which column."""
Scores = dict[Key, list[float]]
"""One score of each seed."""


def column_of(task: str, figure: str) -> str:
    """Returns what a task's figure is called."""
    return f"{task}: {figure.replace('_', ' ').replace('/', ' ')}"


def scores_of(seeds: Sequence[Sequence[Found]], tasks: Mapping[str, TaskConfig]) -> Scores:
    """Returns each task's score and what is told beside it."""
    scores: Scores = {}
    for found in (one for seed in seeds for one in seed):
        task = tasks[found.task]
        for figure in filter(None, (task.figure, task.beside)):
            scores.setdefault((found.what, found.setting, column_of(found.task, figure)), []).append(found.figures[figure])
    return scores


def gains_kept(scores: Scores, tasks: Mapping[str, TaskConfig]) -> Scores:
    """Returns, for each merge and task, (merged - base) / (alone - base): the share of what an adapter gained alone.

    Tasks whose adapter gained nothing alone are left out.
    """
    columns = {column_of(name, task.figure) for name, task in tasks.items()}
    kept: Scores = {}
    for (what, setting, column), merged in scores.items():
        if setting == ALONE or column not in columns:
            continue
        base, alone = scores[BASE, ALONE, column], scores[what, ALONE, column]
        shares = [(m - b) / (a - b) for m, a, b in zip(merged, alone, base, strict=True) if a != b]
        if shares:
            kept[what, setting, column.partition(":")[0]] = shares
    return kept


def spread(values: Sequence[float]) -> float:
    """Returns the standard deviation over seeds; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def shown(values: Sequence[float]) -> str:
    """Returns mean and spread as a cell of a table, empty where there is none."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.3f}" + (f" ± {spread(values):.3f}" if len(values) > 1 else "")


def ordered(scores: Scores) -> tuple[list[str], list[str], list[str]]:
    """Returns the whats, settings and columns of `scores` as they came."""
    whats, settings, columns = (list(dict.fromkeys(key[i] for key in scores)) for i in range(3))
    return whats, settings, columns
