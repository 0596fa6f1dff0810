"""Figures of a measurement by name, each with its standard error under the same name plus `_stderr`.

A standard error estimates how far the figure may be from that of all rows of this kind. It is the error of a mean over
independently drawn rows, and is absent if there is one row. For figures near 0 or 1 it is too small: if all rows agree, it is 0.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

Figures = dict[str, float]
STDERR = "_stderr"
ROWS = "rows"
"""Name of the figure with the number of rows. `rows/GROUP` is the number of rows of the figures `.../GROUP`."""


def mean(name: str, values: Sequence[float]) -> Figures:
    """Return the mean of `values` as the figure `name`, with its standard error."""
    figures = {name: statistics.fmean(values)}
    return figures | ({name + STDERR: statistics.stdev(values) / math.sqrt(len(values))} if len(values) > 1 else {})


def ratio(name: str, tops: Sequence[float], bottoms: Sequence[float]) -> Figures:
    """Return sum(tops) / sum(bottoms) as the figure `name`. Each row has one top (numerator) and one bottom (denominator).

    The standard error is that of a ratio estimator, by linearisation (Cochran 1977, Sampling Techniques, chapter 6).
    """
    num, total = len(tops), sum(bottoms)
    estimate = sum(tops) / total
    figures = {name: estimate}
    if num > 1:
        squares = sum((top - estimate * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
        figures[name + STDERR] = math.sqrt(num / (num - 1) * squares) / total
    return figures


def mean_of_groups(name: str, groups: Mapping[str, Sequence[float]]) -> Figures:
    """Return the mean of each group as `name/GROUP`, and the mean of those means as `name`."""
    figures: Figures = {}
    for group, values in sorted(groups.items()):
        figures |= mean(f"{name}/{group}", values) | {f"{ROWS}/{group}": len(values)}
    figures[name] = statistics.fmean(figures[f"{name}/{group}"] for group in groups)
    errors = [figures.get(f"{name}/{group}{STDERR}") for group in groups]
    if known_errors := [error for error in errors if error is not None]:
        figures |= {name + STDERR: math.hypot(*known_errors) / len(groups)} if len(known_errors) == len(groups) else {}
    return figures


def num_rows(figures: Figures, name: str) -> int:
    """Return the number of rows of the figure `name`."""
    return int(figures.get(f"{ROWS}/{name.partition('/')[2]}", figures[ROWS]))


def names(figures: Figures) -> list[str]:
    """Return the names of the figures, without those of standard errors and numbers of rows."""
    return [name for name in figures if not name.endswith(STDERR) and name.partition("/")[0] != ROWS]


def pass_at(k: int, num_answers: int, num_right: int) -> float:
    """Return the probability that at least one of `k` answers is right, drawn from `num_answers` with `num_right` right ones.

    1 - C(n - c, k) / C(n, k): the unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    return 1.0 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)
