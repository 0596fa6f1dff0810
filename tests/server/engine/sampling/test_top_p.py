"""Top-k, top-p and min-p in both implementations, against a slow reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.request import SamplingParams
from server.engine.sampling.sampler import uniform_numbers
from server.engine.sampling.top_p import NUM_GROUPS, Cutoff, apply_cutoffs, draw_candidates

LEVELS = [0.0, 0.1, 0.35, 0.5, 0.77, 0.9, 1 - 2.0**-53]


def left(row: np.ndarray, cutoff: Cutoff) -> list[int]:
    """Return the ids that are left, rising. Takes the likeliest tokens first, and of equals the lower id."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    if cutoff.top_k:
        order = order[: cutoff.top_k]
    whole = sum(float(row[token]) for token in order) if cutoff.top_k else 1.0
    kept, mass = [], 0.0
    for token in order:
        if kept and cutoff.top_p < 1 and mass >= cutoff.top_p * whole:
            break
        mass += float(row[token])
        if row[token] >= np.float32(cutoff.min_p) * row[order[0]]:
            kept.append(token)
    return sorted(kept)


def drawn(row: np.ndarray, ids: list[int], level: float) -> int:
    mass = np.cumsum([float(row[token]) for token in ids])
    return next(token for token, until in zip(ids, mass, strict=True) if until > level * mass[-1] or token == ids[-1])


def check(row: np.ndarray, cutoff: Cutoff) -> None:
    ids = left(row, cutoff)
    actual = apply_cutoffs(torch.from_numpy(row)[None], [cutoff])[0].numpy()
    expected = np.where(np.isin(np.arange(len(row)), ids), row, 0)
    assert np.array_equal(actual, expected), (np.flatnonzero(actual), ids)
    with_probability = [token for token in ids if row[token] > 0]
    tokens = draw_candidates(np.tile(row, (len(LEVELS), 1)), [cutoff] * len(LEVELS), LEVELS)
    assert tokens == [drawn(row, with_probability, level) for level in LEVELS]


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Draw flat and peaked rows, with ties (a bfloat16 model has many) and with tokens that have no probability."""
    size = draw(st.sampled_from([1, 2, 7, 50, 300, NUM_GROUPS, NUM_GROUPS + 1, 2500]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = torch.from_numpy(rng.normal(size=size) * draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0])))
    if step := draw(st.sampled_from([0, 1, 8])):
        scores = (scores * step).round() / step
    scores[torch.from_numpy(rng.random(size) < draw(st.sampled_from([0.0, 0.5])))] -= 200
    return scores.float().softmax(-1).numpy()


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    row=rows(),
    top_k=st.sampled_from([0, 0, 1, 2, 20, 700, NUM_GROUPS, 1000, 5000]),
    top_p=st.sampled_from([1.0, 1e-9, 0.137, 0.5003, 0.9117, 0.99913, 0.999999]),
    min_p=st.sampled_from([0.0, 0.0, 0.0013, 0.213, 1.0]),
)
def test_both_implementations_leave_the_tokens_of_the_reference(row: np.ndarray, top_k: int, top_p: float, min_p: float) -> None:
    check(row, Cutoff(top_k, top_p, min_p))


def test_top_k_leaves_k_tokens_and_of_equals_the_first() -> None:
    row = np.array([0.1, 0.2, 0.1, 0.4, 0.1, 0.1], np.float32)
    assert left(row, Cutoff(top_k=4)) == [0, 1, 2, 3]
    check(row, Cutoff(top_k=4))


@pytest.mark.parametrize("cutoff", [Cutoff(top_k=1), Cutoff(top_p=1e-12), Cutoff(top_p=0.0)])
def test_the_likeliest_token_always_stays(cutoff: Cutoff) -> None:
    row = np.full(3000, 1 / 3000, np.float32)
    row[[5, 9]] *= 2
    assert draw_candidates(row[None], [cutoff], [0.99]) == [5]
    assert np.flatnonzero(apply_cutoffs(torch.from_numpy(row)[None], [cutoff])[0]).tolist() == [5]


def test_min_p_of_one_leaves_all_tokens_that_are_equally_likeliest() -> None:
    row = np.array([0.3, 0.1, 0.3, 0.3], np.float32)
    assert left(row, Cutoff(min_p=1.0)) == [0, 2, 3]
    check(row, Cutoff(min_p=1.0))


def test_top_p_counts_within_top_k() -> None:
    """The likeliest token, 0.4, is more than 0.65 of the 0.6 that top-k leaves, but less than 0.65 of 1."""
    row = np.array([0.4, 0.2, 0.2, 0.1, 0.1], np.float32)
    assert left(row, Cutoff(top_k=2, top_p=0.65)) == [0]
    check(row, Cutoff(top_k=2, top_p=0.65))
    assert left(row, Cutoff(top_p=0.65)) == [0, 1, 2]
    check(row, Cutoff(top_p=0.65))


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 6.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99, 0.9999])
def test_both_implementations_agree_on_a_vocabulary_of_a_models_size(spread: float, top_p: float) -> None:
    """However flat the distribution, the few candidates must include all tokens that are left."""
    probabilities = (torch.randn(4, 49_152, generator=torch.Generator().manual_seed(3)) * spread).softmax(-1)
    cutoffs, numbers = (
        [Cutoff(top_p=top_p), Cutoff(3000, top_p), Cutoff(50, top_p), Cutoff(min_p=0.01)],
        uniform_numbers(1, 0, 0, 4),
    )
    kept = apply_cutoffs(probabilities, cutoffs).numpy()
    expected = [drawn(row, np.flatnonzero(row).tolist(), number) for row, number in zip(kept, numbers, strict=True)]
    assert draw_candidates(probabilities.numpy(), cutoffs, numbers) == expected


def test_a_row_of_nan_gives_a_token() -> None:
    row = np.full((1, 1000), np.nan, np.float32)
    for cutoff in (Cutoff(top_k=5), Cutoff(top_p=0.5), Cutoff(min_p=0.1), Cutoff(900, 0.5, 0.1)):
        assert 0 <= draw_candidates(row, [cutoff], [0.5])[0] < 1000


def test_a_request_without_limits_is_not_cut() -> None:
    assert Cutoff.from_sampling(SamplingParams(temperature=1.0)).is_none
    assert not Cutoff.from_sampling(SamplingParams(top_p=0.9)).is_none
    assert Cutoff.from_sampling(SamplingParams(top_k=3, top_p=0.5, min_p=0.1)) == Cutoff(3, 0.5, 0.1)


def test_nothing_waits_for_the_device() -> None:
    """A meta tensor has no values, so reading one is an error."""
    assert apply_cutoffs(torch.empty(2, 300, device="meta"), [Cutoff(3, 0.9), Cutoff(min_p=0.1)]).shape == (2, 300)
