"""The flat pool that holds the B of all slots of a module."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori.kernels import Operands, Route, Term, add_delta
from lori.kernels.layout import UNIT
from lori.sparse import SparseB
from tests.lori.operands import put, random_b, sparse

D, R, SLOTS = 600, 8, 5


def dense(operands: Operands, slot: int) -> torch.Tensor:
    """Return the B (D, R) of a slot as the kernel applies it, from the deltas of unit vectors."""
    rank, num_outputs = operands.layout.rank, operands.layout.num_outputs
    y = torch.zeros(rank, num_outputs)
    add_delta(y, torch.eye(rank)[:, None, :], operands, Route.from_terms([Term(0, rank, slot, 1.0)], rank))
    return y.T


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SLOTS - 1), st.sampled_from([0.0, 0.02, 0.2, 1.0, None])), max_size=25))
def test_putting_and_clearing_a_slot_touches_no_other(actions: list[tuple[int, float | None]]) -> None:
    operands, expected = Operands(SLOTS, R, D, torch.float32, "cpu"), [torch.zeros(D, R) for _ in range(SLOTS)]
    for step, (slot, density) in enumerate(actions):
        if density is None:
            operands.clear(slot)
            expected[slot] = torch.zeros(D, R)
        else:
            expected[slot] = random_b(D, R, density, torch.Generator().manual_seed(step))
            put(operands, slot, expected[slot])
        assert all(torch.equal(dense(operands, s), expected[s]) for s in range(SLOTS))
        assert torch.equal(operands.dense.transpose(1, 2), torch.stack(expected))
    for slot in range(SLOTS):
        operands.clear(slot)
    assert operands.num_free_bytes == len(operands.pool)


def test_reserved_room_suffices_without_a_move() -> None:
    g = torch.Generator().manual_seed(0)
    operands = Operands(SLOTS, R, D, torch.bfloat16, "cpu")
    packed = [operands.pack(sparse(random_b(D, R, 0.1, g))) for _ in range(SLOTS)]
    operands.reserve(sum(len(p.blocks) for p in packed))
    pool = operands.pool
    for slot, p in enumerate(packed):
        operands.put(slot, p, 0)
    assert operands.pool is pool
    assert operands.num_free_bytes == 0


def test_a_slot_is_cut_at_windows_if_only_pieces_are_free() -> None:
    operands = Operands(4, R, 512, torch.float32, "cpu")
    one, both = torch.zeros(512, R), torch.ones(512, R)
    one[:256] = 1.0
    operands.reserve(3 * len(operands.pack(sparse(one)).blocks))
    for slot in range(3):
        put(operands, slot, one)
    pool = operands.pool
    operands.clear(0)
    operands.clear(2)
    put(operands, 3, both)  # as long as both holes together
    assert operands.pool is pool
    assert operands.num_free_bytes == 0
    assert torch.equal(dense(operands, 3), both)
    assert torch.equal(dense(operands, 1), one)


@pytest.mark.parametrize(
    ("slot", "basis", "rank"),
    [(-1, 0, R), (SLOTS, 0, R), (0, -1, R), (0, 0, R + 1)],
)
def test_an_invalid_slot_basis_or_rank_is_refused_and_takes_no_room(slot: int, basis: int, rank: int) -> None:
    operands = Operands(SLOTS, R, D, torch.float32, "cpu")
    packed = Operands(1, rank, D, torch.float32, "cpu").pack(sparse(torch.ones(D, rank)))
    with pytest.raises(ValueError, match=r"expected .* a slot that is there and a basis from 0"):
        operands.put(slot, packed, basis)
    assert len(operands.pool) == 0


def test_operands_that_were_used_can_be_copied() -> None:
    operands = Operands(SLOTS, R, D, torch.float32, "cpu")
    put(operands, 1, torch.ones(D, R))
    assert dense(operands, 1).eq(1.0).all()
    copied = deepcopy(operands)
    put(operands, 1, torch.zeros(D, R))
    assert dense(copied, 1).eq(1.0).all()


@torch.inference_mode()
def test_a_pool_that_grew_in_inference_mode_can_be_changed_afterwards() -> None:
    operands = Operands(2, R, D, torch.float32, "cpu")
    put(operands, 0, torch.ones(D, R))
    assert operands.dense[0].eq(1.0).all()
    with torch.inference_mode(False):
        put(operands, 0, torch.full((D, R), 2.0))
        operands.clear(1)
    assert operands.dense[0].eq(2.0).all()


def test_a_slot_that_is_put_again_takes_no_more_room() -> None:
    g = torch.Generator().manual_seed(0)
    operands = Operands(1, R, D, torch.bfloat16, "cpu")
    b = sparse(random_b(D, R, 0.1, g))
    operands.put(0, operands.pack(b), 0)
    before = operands.num_bytes
    for _ in range(10):
        operands.put(0, operands.pack(b), 0)
    assert operands.num_bytes == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_num_bytes_of_operands_is_what_their_tensors_hold(dtype: torch.dtype) -> None:
    operands = Operands(3, 5, 7, dtype, "cpu")
    for slot in range(3):
        put(operands, slot, torch.ones(7, 5))
    for _ in range(2):
        held = [value for value in vars(operands).values() if isinstance(value, torch.Tensor)]
        assert operands.num_bytes == sum(tensor.untyped_storage().nbytes() for tensor in held)
        assert operands.dense.any()  # the dense copy exists from here on


def test_a_thousand_adapters_take_less_than_four_bytes_an_entry() -> None:
    # The bytes include free room, and the starts and bases of the slots.
    g = torch.Generator().manual_seed(0)
    operands = Operands(1000, 32, 576, torch.bfloat16, "cpu")
    b = SparseB.from_dense(torch.ones(576, 32), torch.rand(576, 32, generator=g) < 0.1)
    packed = operands.pack(b)
    operands.reserve(1000 * len(packed.blocks))
    for slot in range(1000):
        operands.put(slot, packed, 0)
    assert operands.num_bytes <= 4 * 1000 * len(b.values)


def test_a_slot_is_contiguous_if_there_is_room() -> None:
    operands = Operands(2, R, D, torch.bfloat16, "cpu")
    put(operands, 0, torch.ones(D, R))
    put(operands, 1, torch.ones(D, R))
    first, second = operands.starts.tolist()
    length = operands.num_slot_bytes(0) // UNIT
    assert [b - a for a, b in zip(first, second, strict=True)] == [length] * 3
