"""Parametrization by all pairs of values instead of all combinations."""

from collections.abc import Sequence
from typing import Any

from allpairspy import AllPairs


def all_pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return cases in which any two values of different axes meet at least once.

    Values that must meet in threes belong in one axis, as the tuples of their product.
    """
    return [tuple(case) for case in AllPairs([list(axis) for axis in axes])]
