"""Figures and their standard errors."""

import itertools
import math
import statistics

import pytest
import torch

from training.evaluation.figures import mean, mean_of_groups, names, num_rows, pass_at, ratio


def test_a_mean_has_the_error_of_a_mean() -> None:
    # The standard error of a fraction p of n rows is sqrt(p (1 - p) / (n - 1)).
    assert mean("x", [1.0] * 3 + [0.0] * 7) == {"x": 0.3, "x_stderr": pytest.approx(math.sqrt(0.3 * 0.7 / 9))}
    assert mean("x", [0.5]) == {"x": 0.5}
    assert mean("x", [1.0, 1.0]) == {"x": 1.0, "x_stderr": 0.0}


def test_a_ratio_of_equal_parts_is_a_mean() -> None:
    tops = [1.0, 4.0, 2.0, 2.5]
    assert ratio("x", tops, [2] * 4) == pytest.approx(mean("x", [top / 2 for top in tops]))


def test_the_error_of_a_ratio_is_how_far_samples_of_rows_scatter() -> None:
    random = torch.Generator().manual_seed(0)
    bottoms = torch.randint(1, 40, (4000, 200), generator=random).double()
    tops = bottoms * (1 + 0.3 * torch.randn(4000, 200, generator=random).double()) + 2
    samples = [ratio("x", t, b) for t, b in zip(tops.tolist(), bottoms.tolist(), strict=True)]
    scatter = statistics.stdev(sample["x"] for sample in samples)
    assert statistics.fmean(sample["x_stderr"] for sample in samples) == pytest.approx(scatter, rel=0.05)


def test_a_mean_of_groups_gives_each_group_the_same_weight() -> None:
    figures = mean_of_groups("x", {"small": [1.0, 0.0], "large": [0.0] * 98})
    assert figures["x/small"] == 0.5
    assert figures["x"] == 0.25
    assert figures["x_stderr"] == pytest.approx(figures["x/small_stderr"] / 2)
    assert names(figures) == ["x/large", "x/small", "x"]
    assert [num_rows(figures | {"rows": 100}, name) for name in names(figures)] == [98, 2, 100]
    assert "x_stderr" not in mean_of_groups("x", {"one": [1.0], "more": [1.0, 0.0]})


@pytest.mark.parametrize(("num_answers", "num_right", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 3), (5, 3, 3), (5, 5, 5), (1, 1, 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(num_answers: int, num_right: int, k: int) -> None:
    draws = list(itertools.combinations([True] * num_right + [False] * (num_answers - num_right), k))
    assert pass_at(k, num_answers, num_right) == pytest.approx(sum(map(any, draws)) / len(draws))
