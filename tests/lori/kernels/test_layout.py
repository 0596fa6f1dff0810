"""The run-time layout of B: packing and unpacking restore B, with numpy and in C++.

Shapes: D outputs, R rank, K entries (nnz).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori.kernels import layout
from lori.kernels.layout import HEADER, LANES, UNIT, WINDOW, Layout, Packed, place_of
from lori.sparse import SparseB
from tests.lori.operands import random_b, sparse

DTYPES = [torch.bfloat16, torch.float32]


def pack_both(target: Layout, b: SparseB, scale: float = 1.0) -> Packed:
    """Pack with numpy and in C++, and assert that both give the same bytes."""
    ours, theirs = layout.pack_in_numpy(target, b, scale), layout.pack(target, b, scale)
    assert torch.equal(ours.starts, theirs.starts)
    assert torch.equal(ours.blocks, theirs.blocks)
    return ours


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    num_outputs=st.integers(1, 600),
    rank=st.sampled_from([1, 2, 3, 8, 31, 32, 33, 64, 100, 256, 257, 300]),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_packing_and_unpacking_restores_b(num_outputs: int, rank: int, density: float, dtype: torch.dtype, seed: int) -> None:
    b = random_b(num_outputs, rank, density, torch.Generator().manual_seed(seed))
    target = Layout(num_outputs, rank, dtype)
    packed = pack_both(target, sparse(b), 0.5)
    expected = (0.5 * b).to(dtype)
    assert torch.equal(layout.unpack(target, packed.blocks, packed.starts), expected.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_b_of_a_lower_rank_has_zeros_beyond_it(dtype: torch.dtype) -> None:
    b = random_b(70, 5, 0.5, torch.Generator().manual_seed(0))
    target = Layout(70, 300, dtype)  # with columns of two bytes, since the rank of the operands needs them
    packed = pack_both(target, sparse(b))
    dense = layout.unpack(target, packed.blocks, packed.starts)
    assert torch.equal(dense[:, :5], b.to(dtype).float())
    assert not dense[:, 5:].any()


def test_a_window_has_the_documented_layout() -> None:
    b = torch.zeros(18, 4)
    b[17] = torch.tensor([1.0, 2.0, 3.0, 0.0])  # the longest: position 0
    b[2, 3] = 4.0  # position 1
    packed = pack_both(Layout(18, 4, torch.float32), sparse(b))
    assert packed.starts.tolist() == [0]
    block = packed.blocks.numpy()
    assert block[:HEADER].view("uint16").tolist() == [3] * 16  # slice 0 has three steps, the others none
    steps = block[HEADER:][: 3 * 5 * LANES].reshape(3, 5 * LANES)  # 4 bytes a value, 1 a column
    values, columns = steps[:, : 4 * LANES].copy().view("float32"), steps[:, 4 * LANES :]
    places = block[HEADER + steps.size :]
    assert (places[17], places[2], places[0]) == (0, 2, 4)
    assert values[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert values[:, 1].tolist() == [4.0, 0.0, 0.0]
    assert columns[:, :2].tolist() == [[0, 3], [1, 0], [2, 0]]
    assert not values[:, 2:].any()


def test_two_bf16_steps_lie_together_and_an_odd_one_alone() -> None:
    b = torch.zeros(16, 4)
    b[0] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    b[1, 3] = 4.0
    block = pack_both(Layout(16, 4, torch.bfloat16), sparse(b)).blocks
    assert block[HEADER:][:8].view(torch.bfloat16).tolist() == [1.0, 2.0, 4.0, 0.0]
    assert block[HEADER + 2 * LANES * 2 :][:4].tolist() == [0, 1, 3, 0]
    odd = HEADER + 2 * LANES * 3
    assert block[odd : odd + 4].view(torch.bfloat16).tolist() == [3.0, 0.0]
    assert block[odd + LANES * 2 :][:2].tolist() == [2, 0]


def test_places_interleave_two_slices() -> None:
    places = place_of(torch.arange(WINDOW).numpy()).tolist()
    assert sorted(places) == list(range(WINDOW))
    assert (places[0], places[1], places[16], places[17], places[32]) == (0, 2, 1, 3, 32)


def test_an_empty_window_takes_no_bytes() -> None:
    b = torch.zeros(600, 8)
    b[300, 1] = 1.0
    packed = pack_both(Layout(600, 8, torch.bfloat16), sparse(b))
    assert packed.starts.tolist() == [-1, 0, -1]
    assert len(packed.blocks) % UNIT == 0
    assert len(pack_both(Layout(600, 8, torch.bfloat16), sparse(torch.zeros(600, 8))).blocks) == 0


@pytest.mark.parametrize(("rank", "dtype"), [(0, torch.float32), (2049, torch.float32), (8, torch.float16), (8, torch.float64)])
def test_a_rank_or_dtype_without_a_kernel_is_refused(rank: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(rank) if dtype is torch.float32 else str(dtype)):
        Layout(16, rank, dtype)


def test_a_tenth_of_b_takes_less_than_four_bytes_an_entry() -> None:
    # Of 576 outputs at r = 32; 3 bytes are the value and the column, the rest is padding, places and headers.
    mask = torch.rand(576, 32, generator=torch.Generator().manual_seed(0)) < 0.1
    b = SparseB.from_dense(torch.ones(576, 32), mask)
    packed = pack_both(Layout(576, 32, torch.bfloat16), b)
    assert len(packed.blocks) < 4 * len(b.values)
