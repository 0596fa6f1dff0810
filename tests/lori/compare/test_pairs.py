"""Comparison of many adapters at once, against comparisons of two."""

from itertools import combinations_with_replacement

import pytest

from lori.compare.pairs import compare, compare_pairs, module_order
from lori.errors import AdapterError
from tests.lori.compare.test_compare import OTHERS, A, on_another_base, on_entries

ADAPTERS = [A, *OTHERS.values(), on_entries([], []), on_entries([0, 4], [0.0, 2.0])]
PAIRS = list(combinations_with_replacement(range(len(ADAPTERS)), 2))


def near(value: float | None, expected: float | None) -> bool:
    return value == expected if expected is None else value == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_every_pair_equals_the_comparison_of_the_two_alone() -> None:
    for (i, j), result in zip(PAIRS, compare_pairs(ADAPTERS, PAIRS), strict=True):
        alone = compare(ADAPTERS[i], ADAPTERS[j]).total
        for name in ("num_a", "num_b", "num_both", "overlap", "sign_conflict"):
            assert getattr(result, name) == getattr(alone, name), (i, j, name)
        for name in ("chance_overlap", "square_a", "square_b", "inner", "square_sum", "cosine"):
            assert near(getattr(result, name), getattr(alone, name)), (i, j, name)


def test_only_the_requested_pairs_are_compared() -> None:
    (result,) = compare_pairs(ADAPTERS, [(3, 1)])
    assert (result.num_a, result.num_b) == (ADAPTERS[3].nnz, ADAPTERS[1].nnz)


def test_the_comparison_pauses_after_each_module() -> None:
    rests: list[None] = []
    compare_pairs(ADAPTERS, [(0, 1)], lambda: rests.append(None))
    assert len(rests) == len(module_order(ADAPTERS)) > 2


def test_adapters_of_two_base_models_are_refused() -> None:
    with pytest.raises(AdapterError, match="stranger"):
        compare_pairs([A, on_another_base()], [(0, 1)])
