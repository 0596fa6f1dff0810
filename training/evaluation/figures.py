"""What a measurement comes to: figures by name, each with its standard error under the same name and `_stderr`.

A standard error says how far the figure may lie from that of all rows such as these. It is that of a mean over rows drawn
independently, and absent where there is one row. Next to 0 and 1 it is too small: where all rows agree it is 0.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

Figures = dict[str, float]
STDERR = "_stderr"
ROWS = "rows"
"""The rows of all figures; `rows/GROUP` those of the figures `.../GROUP`."""


def mean(name: str, values: Sequence[float]) -> Figures:
    """Return the mean of `values`."""
    figures = {name: statistics.fmean(values)}
    return figures | ({name + STDERR: statistics.stdev(values) / math.sqrt(len(values))} if len(values) > 1 else {})


def ratio(name: str, tops: Sequence[float], bottoms: Sequence[float]) -> Figures:
    """Return sum(tops) / sum(bottoms) of rows that have one of each.

    Its error is that of a ratio estimator, by linearisation (Cochran 1977, Sampling Techniques, chapter 6).
    """
    num, total = len(tops), sum(bottoms)
    found = sum(tops) / total
    figures = {name: found}
    if num > 1:
        squares = sum((top - found * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
        figures[name + STDERR] = math.sqrt(num / (num - 1) * squares) / total
    return figures


def mean_of_groups(name: str, groups: Mapping[str, Sequence[float]]) -> Figures:
    """Return the mean of each group as `name/GROUP`, and the mean of those means as `name`."""
    figures: Figures = {}
    for group, values in sorted(groups.items()):
        figures |= mean(f"{name}/{group}", values) | {f"{ROWS}/{group}": len(values)}
    figures[name] = statistics.fmean(figures[f"{name}/{group}"] for group in groups)
    errors = [figures.get(f"{name}/{group}{STDERR}") for group in groups]
    if known := [error for error in errors if error is not None]:
        figures |= {name + STDERR: math.hypot(*known) / len(groups)} if len(known) == len(groups) else {}
    return figures


def num_rows(figures: Figures, name: str) -> int:
    """Return the rows that the figure `name` is of."""
    return int(figures.get(f"{ROWS}/{name.partition('/')[2]}", figures[ROWS]))


def names(figures: Figures) -> list[str]:
    """Return the names of the figures themselves, without their errors and rows."""
    return [name for name in figures if not name.endswith(STDERR) and name.partition("/")[0] != ROWS]


def pass_at(k: int, num_answers: int, num_right: int) -> float:
    """Return the chance that one of `k` answers is right, drawn from `num_answers` of which `num_right` are.

    1 - C(n - c, k) / C(n, k): the unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    return 1.0 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)
