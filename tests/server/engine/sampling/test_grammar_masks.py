"""Grammar masks over rows of logits, on a CPU and on other devices, and the logits that are restored afterwards."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.sampling.grammars import GrammarMasks, _masked_on_device, bitmask


def logits(num_rows: int, size: int) -> torch.Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(0)) * 3


cases = st.integers(1, 70).flatmap(
    lambda size: st.tuples(st.just(size), st.dictionaries(st.integers(0, 4), st.sets(st.integers(0, size - 1)), max_size=5))
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(cases, min_size=1, max_size=3))
def test_all_but_the_allowed_tokens_are_masked_and_the_logits_are_restored_afterwards(
    cases: list[tuple[int, dict[int, set[int]]]],
) -> None:
    masks = GrammarMasks()
    for size, tokens in cases:
        allowed = {row: bitmask(some, size) for row, some in tokens.items()}
        rows = logits(5, size)
        before, expected = rows.clone(), rows.clone()
        for row, some in tokens.items():
            expected[row, [token for token in range(size) if token not in some]] = -torch.inf
        with masks.masked(rows, allowed):
            assert torch.equal(rows, expected)
        assert torch.equal(rows, before)
        if allowed:
            with _masked_on_device(rows, allowed):
                assert torch.equal(rows, expected)
            assert torch.equal(rows, before)


def test_a_tokenizer_may_have_more_tokens_than_the_model_logits() -> None:
    rows = logits(1, 40)
    for masked in (GrammarMasks().masked, _masked_on_device):
        with masked(rows, {0: bitmask([3, 39, 90], 100)}):
            assert rows.isfinite().nonzero().tolist() == [[0, 3], [0, 39]]


def test_the_logits_are_put_back_after_an_error_too() -> None:
    rows = logits(2, 40)
    before = rows.clone()
    for masked in (GrammarMasks().masked, _masked_on_device):
        with pytest.raises(ZeroDivisionError), masked(rows, {1: bitmask([3], 40)}):
            raise ZeroDivisionError
        assert torch.equal(rows, before)


def test_nan_and_infinite_logits_are_put_back_as_they_were() -> None:
    rows = logits(1, 40)
    rows[0, 3], rows[0, 4], rows[0, 5] = torch.nan, torch.inf, -torch.inf
    for masked in (GrammarMasks().masked, _masked_on_device):
        with masked(rows, {0: bitmask([3, 4, 6], 40)}):
            assert rows[0, 4:7].isinf().tolist() == [True, True, False]
        assert rows[0, 3].isnan()
        assert rows[0, 4:6].tolist() == [np.inf, -np.inf]


def test_nothing_waits_for_the_device() -> None:
    """A meta tensor has no values, so reading one is an error."""
    with GrammarMasks().masked(torch.empty(2, 40, device="meta"), {1: bitmask([1], 40)}):
        pass


@pytest.mark.gpu
def test_a_gpu_masks_the_same_tokens_as_a_cpu() -> None:
    rows, allowed = logits(3, 1000), {2: bitmask(range(0, 1000, 3), 1000), 0: bitmask([999], 1000)}
    there = rows.cuda()
    with GrammarMasks().masked(rows, allowed), GrammarMasks().masked(there, allowed):
        assert torch.equal(there.cpu(), rows)
    assert torch.equal(there.cpu(), rows)
