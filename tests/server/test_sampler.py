"""The tokens that are picked, and their log-probabilities."""

import pytest
import torch

from server.engine.request import Sequence
from server.engine.sampler import log_probabilities, sample, uniform
from tests.server.rig import request


def sequence(temperature: float, seed: int = 0, num_output: int = 0) -> Sequence:
    return Sequence(request(temperature=temperature, seed=seed), output_ids=[0] * num_output)


def logits(num_rows: int, size: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def test_temperature_0_takes_the_likeliest() -> None:
    rows = logits(6)
    assert sample(rows, [sequence(0.0, seed=i) for i in range(6)]) == rows.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-300, 5e-324])
def test_a_temperature_near_0_takes_the_likeliest_too(temperature: float) -> None:
    rows = logits(6)
    assert sample(rows, [sequence(temperature, seed=i) for i in range(6)]) == rows.argmax(-1).tolist()


def test_the_same_seed_draws_the_same_whoever_shares_the_batch() -> None:
    rows = logits(8)
    sequences = [sequence(0.0 if i % 3 == 0 else 0.5 + i / 4, seed=100 + i, num_output=i) for i in range(8)]
    together = sample(rows, sequences)
    assert together == [sample(rows[i : i + 1], [s])[0] for i, s in enumerate(sequences)]
    order = [5, 2, 7, 0]
    assert sample(rows[order], [sequences[i] for i in order]) == [together[i] for i in order]


def test_another_seed_and_another_place_draw_anew() -> None:
    row = torch.zeros(1, 10_000)
    drawn = [sample(row, [sequence(1.0, seed, place)])[0] for seed in (0, 1, 2**63 - 1) for place in range(20)]
    assert len(set(drawn)) > 55


def test_the_numbers_behind_the_draws_stay_as_they_are() -> None:
    """A seed in a reply gives the same tokens in every version of this server."""
    assert [uniform(0, 0), uniform(0, 1), uniform(2**62, 5)] == [0.011546754286331562, 0.5023796042735054, 0.652083168624115]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_are_distributed_as_softmax_says(temperature: float) -> None:
    count = 4000
    row = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5, -3.0, 1.5, -30.0]])
    drawn = sample(row.expand(count, -1), [sequence(temperature, seed) for seed in range(count)])
    found = torch.bincount(torch.tensor(drawn), minlength=8)
    expected = (row[0].double() / temperature).softmax(-1) * count
    spread = (expected * (1 - expected / count)).sqrt()
    assert ((found - expected).abs() <= 4 * spread + 1e-6).all(), (found, expected)


def test_a_token_without_probability_is_never_drawn() -> None:
    row = torch.full((1, 9), float("-inf"))
    row[0, [3, 5]] = 0.0
    drawn = {sample(row, [sequence(1.0, seed)])[0] for seed in range(200)}
    assert drawn == {3, 5}


def test_log_probabilities_are_torchs() -> None:
    rows = logits(5)
    tokens = [4, 0, 49, 17, 17]
    expected = torch.log_softmax(rows, -1)
    found = log_probabilities(rows, tokens, 3)
    for row, (token, (value, top)) in enumerate(zip(tokens, found, strict=True)):
        assert value == pytest.approx(expected[row, token].item(), abs=1e-6)
        best = expected[row].topk(3)
        assert list(top) == best.indices.tolist()
        assert list(top.values()) == pytest.approx(best.values.tolist(), abs=1e-6)


def test_no_alternatives_where_none_are_asked_for() -> None:
    assert [top for _, top in log_probabilities(logits(2), [1, 2], 0)] == [{}, {}]
