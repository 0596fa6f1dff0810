"""Pruning before a merge: the entries that survive by magnitude or by chance, and the signs that are elected."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from lori.adapter import Adapter
from lori.merge import MergeMethod, SignMethod, drop_and_rescale, keep_largest, merge
from lori.sparse import SparseB
from tests.lori.merges import PRUNING, Q0, SIGNS, WEIGHT_SETS, adapter, adapter_of, random_b

TIES: list[MergeMethod] = ["ties", "dare_ties"]
DARE: list[MergeMethod] = ["dare_linear", "dare_ties"]


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("method", TIES)
def test_a_tied_election_elects_plus(method: MergeMethod, sign: SignMethod) -> None:
    one, other = (
        adapter_of(name, {Q0: SparseB((9, 3), torch.tensor([4]).int(), torch.tensor([value]))})
        for name, value in (("a", 2.0), ("b", -2.0))
    )
    result = merge([one, other], [0.5, 1], method, density=1, sign=sign)
    assert result.modules[Q0].indices.tolist() == [4]
    assert result.modules[Q0].values.tolist() == [1.0]


def test_the_two_elections_differ() -> None:
    terms = [
        adapter_of(name, {Q0: SparseB((9, 3), torch.tensor([4]).int(), torch.tensor([value]))})
        for name, value in (("a", 1.0), ("b", 2.0), ("c", -8.0))
    ]
    by_sign = {sign: merge(terms, [1, 1, 1], "ties", sign=sign).modules[Q0].values.tolist() for sign in SIGNS}
    assert by_sign == {"total": [-8.0], "frequency": [1.5]}


@pytest.mark.parametrize(("density", "expected"), [(0.01, 1), (0.1, 1), (0.3, 4), (0.5, 6), (0.9, 12), (1.0, 13)])
def test_density_is_a_fraction_of_the_nonzero_entries(density: float, expected: int) -> None:
    one = adapter("a")  # 13 entries in each module
    result = merge([one], [1], "magnitude", density=density)
    for module, b in result.modules.items():
        own = one.modules[module].values.abs()
        assert sorted(b.values.abs().tolist()) == sorted(own.tolist())[-expected:]


def test_the_first_of_equal_magnitudes_survive() -> None:
    indices = torch.tensor([1, 3, 5, 7, 9, 11]).int()
    one = adapter_of("a", {Q0: SparseB((9, 3), indices, torch.tensor([1.0, -1.0, 3.0, 1.0, -1.0, 0.5]))})
    assert merge([one], [1], "magnitude", density=0.5).modules[Q0].indices.tolist() == [1, 3, 5]


def test_surviving_entries_stay_in_order() -> None:
    indices = torch.tensor([1, 3, 5, 7]).int()
    pruned = keep_largest(SparseB((9, 3), indices, torch.tensor([1.0, -2.0, 0.5, 4.0])), 0.75)
    assert (pruned.indices.tolist(), pruned.values.tolist()) == ([1, 3, 7], [1.0, -2.0, 4.0])


@pytest.mark.parametrize("method", PRUNING)
def test_an_empty_adapter_can_be_pruned(method: MergeMethod) -> None:
    empty = adapter_of("a", {Q0: random_b((9, 3), 0, 0)})
    assert merge([empty], [1], method).nnz == 0


def large(name: str, seed: int, alpha: float = 6.0) -> Adapter:
    """Return an adapter with half of 60,000 entries."""
    return adapter_of(name, {"m": random_b((20_000, 3), 30_000, seed)}, alpha=alpha, shapes={"m": (20_000, 2)})


LARGE = [large("a", 0), large("b", 1), large("c", 2, alpha=1.5)]


def survivors(one: Adapter, density: float, seed: int = 0) -> torch.Tensor:
    """Return the mask of the entries of B that survive DARE, (D, R) bool."""
    return merge([one], [1], "dare_linear", density=density, seed=seed).modules["m"].mask


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_each_entry_with_the_probability_asked_and_rescales_it(density: float) -> None:
    result = merge([LARGE[0]], [1], "dare_linear", density=density).modules["m"]
    own = LARGE[0].modules["m"].dense(torch.float64)
    assert torch.equal(result.dense(), torch.where(result.mask, own / density, 0.0).float())
    deviation = math.sqrt(30_000 * density * (1 - density))
    assert abs(result.values.numel() - 30_000 * density) < 4 * deviation
    halves = result.mask.flatten().chunk(2)
    assert abs(int(halves[0].sum()) - int(halves[1].sum())) < 5 * deviation


@pytest.mark.parametrize("weights", WEIGHT_SETS)
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_dare_linear_sums_the_surviving_entries(density: float, weights: Sequence[float]) -> None:
    result = merge(LARGE, weights, "dare_linear", density=density, seed=3).modules["m"].dense(torch.float64)
    expected = torch.zeros_like(result)
    for one, weight in zip(LARGE, weights, strict=True):
        own = one.config.scale * one.modules["m"].dense(torch.float64) * survivors(one, density, seed=3)
        expected += weight * own / density
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("weights", WEIGHT_SETS)
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_dare_ties_averages_the_surviving_entries_of_the_elected_sign(
    density: float, weights: Sequence[float], sign: SignMethod
) -> None:
    result = merge(LARGE, weights, "dare_ties", density=density, sign=sign, seed=3).modules["m"].dense(torch.float64)
    pruned = torch.stack(
        [one.config.scale * one.modules["m"].dense(torch.float64) * survivors(one, density, seed=3) / density for one in LARGE]
    )
    votes = (pruned if sign == "total" else pruned.sign()).sum(0)
    agree = pruned * torch.where(votes < 0, -1.0, 1.0) > 0
    weighted = torch.tensor(weights, dtype=torch.float64).view(3, 1, 1) * pruned
    expected = (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_the_draw_depends_on_the_seed_the_content_and_the_module() -> None:
    def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one == other).double().mean())

    shapes = {"m": (20_000, 2), "n": (20_000, 2)}
    modules = {module: SparseB((20_000, 3), torch.arange(60_000).int(), torch.ones(60_000)) for module in shapes}
    one, other = (adapter_of("a", modules, alpha=alpha, shapes=shapes) for alpha in (6.0, 5.0))
    mask = survivors(one, 0.5)
    assert torch.equal(survivors(replace(one, name="b"), 0.5), mask)
    independent = {
        "seed": survivors(one, 0.5, seed=1),
        "content": survivors(other, 0.5),
        "module": merge([one], [1], "dare_linear").modules["n"].mask,
    }
    assert {what: round(agreement(mask, drawn), 1) for what, drawn in independent.items()} == dict.fromkeys(independent, 0.5)


def test_the_draw_is_the_same_in_every_version() -> None:
    b = SparseB((9, 3), torch.arange(27).int(), torch.ones(27))
    drawn = drop_and_rescale(b, 0.5, "7|math|layers.0.q_proj")
    assert drawn.indices.tolist() == [0, 3, 7, 9, 10, 11, 12, 14, 18, 22]
    assert drawn.values.tolist() == [2.0] * 10
