"""The numbers that the planner knows are those of docs/benchmarks.md."""

import re
from pathlib import Path

import pytest

from server.plan.speed import BY_ADAPTERS, BY_TERMS, Ratio, measured_ratio

PAGE = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("ratio", [*BY_ADAPTERS.values(), *BY_TERMS.values()], ids=lambda ratio: str(ratio.value))
def test_a_ratio_is_in_the_benchmarks_table(ratio: Ratio) -> None:
    case = re.fullmatch(r"docs/benchmarks.md: (.*?)( adapters?)?, 32 users, .*", ratio.source)
    assert case
    row = re.search(rf"^\| lori-server \| {re.escape(case[1])}(?: adapters?)? \| 32 \|[^|]*\| ([\d.]+) ", PAGE, re.MULTILINE)
    assert row
    assert float(row[1]) == ratio.value


@pytest.mark.parametrize(
    ("num_adapters", "num_terms", "expected"),
    [(1, 1, 0.86), (2, 1, 0.84), (32, 1, 0.82), (33, 1, 0.80), (100_000, 1, 0.80), (32, 2, 0.78), (9, 3, 0.72), (9, 4, 0.72)],
)
def test_the_measured_case_is_no_easier_than_the_requested_one(num_adapters: int, num_terms: int, expected: float) -> None:
    ratio = measured_ratio(num_adapters, num_terms, 3.2, 32)
    assert ratio
    assert ratio.value == expected


def test_an_unmeasured_case_has_no_ratio() -> None:
    assert measured_ratio(10, 5, 3.2, 32) is None
    assert measured_ratio(10, 1, 3.3, 32) is None
    assert measured_ratio(10, 1, 3.2, 33) is None
