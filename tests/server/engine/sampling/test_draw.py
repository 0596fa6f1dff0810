"""Drawing a token by inverse CDF."""

import numpy as np
import pytest
import torch

from server.engine.sampling.sampler import WIDTH, draw, uniform_numbers

HIGHEST = 1 - 2.0**-53


def probabilities(num_rows: int, size: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * spread).softmax(-1)


def levels(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 50, WIDTH - 1, WIDTH, WIDTH + 1, 1000, 10 * WIDTH])
@pytest.mark.parametrize("spread", [0.0, 3.0, 30.0])
def test_the_drawn_token_is_where_the_cdf_passes_the_level(size: int, spread: float) -> None:
    rows = probabilities(40, size, spread)
    numbers = uniform_numbers(1, 0, 0, 40)
    mass = rows.numpy().astype(np.float64).cumsum(-1)
    for token, level, until in zip(draw(rows, levels(*numbers)).tolist(), numbers, mass, strict=True):
        target, rounding = level * until[-1], 1e-6
        assert target < until[token] + rounding
        assert token == 0 or target > until[token - 1] - rounding


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_probabilities_need_not_sum_to_one(scale: float) -> None:
    rows, numbers = probabilities(20, 300), levels(*uniform_numbers(2, 0, 0, 20))
    assert draw(rows * scale, numbers).tolist() == draw(rows, numbers).tolist()


@pytest.mark.parametrize("size", [9, 3 * WIDTH, 3 * WIDTH + 5])
def test_a_token_without_probability_is_never_drawn(size: int) -> None:
    row = torch.zeros(1, size)
    row[0, [3, size - 2]] = torch.tensor([0.25, 0.75])
    numbers = [0.0, 0.2499, 0.2501, HIGHEST]
    assert draw(row.expand(4, -1), levels(*numbers)).tolist() == [3, 3, size - 2, size - 2]


def test_the_last_level_draws_a_token_that_has_a_probability() -> None:
    """Rounding may take the level to the end of the CDF, or past it."""
    rows = probabilities(64, 1000, 20.0)
    rows[:, 900:] = 0
    drawn = draw(rows, levels(*[HIGHEST] * 64))
    assert (rows.gather(1, drawn[:, None]) > 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_probabilities(temperature: float) -> None:
    count = 4000
    row = (torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0, 1.5, -30.0]) / temperature).softmax(-1)
    numbers = [uniform_numbers(seed, 0, 0, 1)[0] for seed in range(count)]
    counts = torch.bincount(draw(row.expand(count, -1), levels(*numbers)), minlength=8)
    expected = row.double() * count
    spread = (expected * (1 - expected / count)).sqrt()
    assert ((counts - expected).abs() <= 4 * spread + 1e-6).all(), (counts, expected)


def test_a_row_of_nan_gives_a_token_and_leaves_the_others_alone() -> None:
    rows, numbers = probabilities(5, 300), levels(*uniform_numbers(3, 0, 0, 5))
    expected = draw(rows, numbers).tolist()
    rows[2] = torch.nan
    tokens = draw(rows, numbers).tolist()
    assert 0 <= tokens.pop(2) < 300
    assert tokens == expected[:2] + expected[3:]


def test_nothing_waits_for_the_device() -> None:
    """A meta tensor has no values, so reading one is an error."""
    assert draw(torch.empty(4, 300, device="meta"), torch.empty(4, dtype=torch.float64, device="meta")).shape == (4,)
