"""Scores of several seeds, their spread, and the share of a gain that a merge keeps."""

import math
import statistics
from collections.abc import Mapping, Sequence

from training.study.claims import ALONE, BASE, Result
from training.study.config import TaskConfig

Key = tuple[str, str, str]
"""(method or base, setting, column of a table)."""
Scores = dict[Key, list[float]]
"""Scores by key, one for each seed."""


LEAST_GAIN = 0.02
"""Smallest gain of which shares are computed, in the task's own figure: two rows of a hundred, or 0.02 nats."""


def column_of(task: str, figure: str) -> str:
    """Return the heading of the column of a task's figure."""
    return f"{task}: {figure.replace('_', ' ').replace('/', ' ')}"


def scores_of(seeds: Sequence[Sequence[Result]], tasks: Mapping[str, TaskConfig]) -> Scores:
    """Return the score of each task, and the figure that is reported beside it."""
    scores: Scores = {}
    for result in (result for seed in seeds for result in seed):
        task = tasks[result.task]
        for figure in filter(None, (task.figure, task.beside)):
            scores.setdefault((result.what, result.setting, column_of(result.task, figure)), []).append(result.figures[figure])
    return scores


def gains_kept(scores: Scores, tasks: Mapping[str, TaskConfig]) -> Scores:
    """Return, for each merge and task, (merged - base) / (alone - base): the share of the adapter's gain that the merge keeps.

    An adapter that gained less than `LEAST_GAIN` alone, with any seed, is left out, since a share of almost nothing is noise.
    """
    kept_gains: Scores = {}
    for name, task in tasks.items():
        column = column_of(name, task.figure)
        sign = -1.0 if task.is_loss else 1.0
        for (what, setting, scored_column), merged in scores.items():
            if setting == ALONE or scored_column != column:
                continue
            base, single = scores[BASE, ALONE, column], scores[what, ALONE, column]
            gains = [sign * (a - b) for a, b in zip(single, base, strict=True)]
            if min(gains) >= LEAST_GAIN:
                shares = zip(merged, base, gains, strict=True)
                kept_gains[what, setting, name] = [sign * (m - b) / gain for m, b, gain in shares]
    return kept_gains


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds; NaN for one seed, which matplotlib does not draw."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def format_scores(values: Sequence[float]) -> str:
    """Return mean and spread as a cell of a table; empty without values."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.3f}" + (f" ± {spread(values):.3f}" if len(values) > 1 else "")


def methods_of(scores: Scores) -> list[str]:
    """Return the methods (or base) of `scores`, in order."""
    return list(dict.fromkeys(what for what, _, _ in scores))


def columns_of(scores: Scores) -> list[str]:
    """Return the columns of `scores`, in order."""
    return list(dict.fromkeys(column for _, _, column in scores))
