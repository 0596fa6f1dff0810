"""Figures of several seeds as numbers to compare: scores, their spread, and the share of a gain that a merge keeps."""

import math
import statistics
from collections.abc import Mapping, Sequence

from training.study.claims import ALONE, BASE, Found
from training.study.config import TaskConfig

Key = tuple[str, str, str]
"""What was measured, at which setting, in which column."""
Scores = dict[Key, list[float]]
"""One score of each seed."""


LEAST_GAIN = 0.02
"""In a task's own figure: two rows of a hundred, or 0.02 nats."""


def column_of(task: str, figure: str) -> str:
    """Return what a task's figure is called."""
    return f"{task}: {figure.replace('_', ' ').replace('/', ' ')}"


def scores_of(seeds: Sequence[Sequence[Found]], tasks: Mapping[str, TaskConfig]) -> Scores:
    """Return each task's score and what is told beside it."""
    scores: Scores = {}
    for found in (one for seed in seeds for one in seed):
        task = tasks[found.task]
        for figure in filter(None, (task.figure, task.beside)):
            scores.setdefault((found.what, found.setting, column_of(found.task, figure)), []).append(found.figures[figure])
    return scores


def gains_kept(scores: Scores, tasks: Mapping[str, TaskConfig]) -> Scores:
    """Return, for each merge and task, (merged - base) / (alone - base): the share of what an adapter gained alone.

    An adapter that gained less than `LEAST_GAIN` alone, with any seed, is left out: a share of about nothing says nothing.
    """
    kept: Scores = {}
    for name, task in tasks.items():
        column = column_of(name, task.figure)
        sign = -1.0 if task.is_loss else 1.0
        for (what, setting, found), merged in scores.items():
            if setting == ALONE or found != column:
                continue
            base, alone = scores[BASE, ALONE, column], scores[what, ALONE, column]
            gains = [sign * (a - b) for a, b in zip(alone, base, strict=True)]
            if min(gains) >= LEAST_GAIN:
                shares = zip(merged, base, gains, strict=True)
                kept[what, setting, name] = [sign * (m - b) / gain for m, b, gain in shares]
    return kept


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds; NaN of one, which has none and is drawn without."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def shown(values: Sequence[float]) -> str:
    """Return mean and spread as a cell of a table, empty where there is none."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.3f}" + (f" ± {spread(values):.3f}" if len(values) > 1 else "")


def whats_of(scores: Scores) -> list[str]:
    """Return what was measured, in order."""
    return list(dict.fromkeys(what for what, _, _ in scores))


def columns_of(scores: Scores) -> list[str]:
    """Return the columns of `scores`, in order."""
    return list(dict.fromkeys(column for _, _, column in scores))
