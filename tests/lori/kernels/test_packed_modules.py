"""One adapter's B of many modules, put at once, compared with module by module."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori.kernels import Operands, Packed, packed_modules
from lori.kernels.layout import unpack
from lori.kernels.packed_modules import PackedModules, clear_modules, put_modules
from tests.lori.operands import random_b, sparse

SIZES = {"a": 40, "b": 600, "c": 256}
"""D of each module."""
R, SLOTS = 6, 4


def make_operands(dtype: torch.dtype = torch.bfloat16) -> dict[str, Operands]:
    return {name: Operands(SLOTS, R, num_outputs, dtype, "cpu") for name, num_outputs in SIZES.items()}


def make_packed(operands: Mapping[str, Operands], seed: int, density: float = 0.3, names: str = "abc") -> dict[str, Packed]:
    g = torch.Generator().manual_seed(seed)
    return {name: operands[name].pack(sparse(random_b(SIZES[name], R, density, g))) for name in names}


def dense(operands: Mapping[str, Operands], slot: int) -> list[torch.Tensor]:
    """Return the B (D, R) of a slot in every module."""
    return [
        unpack(module_operands.layout, module_operands.pool, module_operands.starts[slot])
        for module_operands in operands.values()
    ]


def assert_same(ours: Mapping[str, Operands], theirs: Mapping[str, Operands]) -> None:
    for slot in range(SLOTS):
        assert all(torch.equal(a, b) for a, b in zip(dense(ours, slot), dense(theirs, slot), strict=True))
        for name in ours:
            assert ours[name].num_slot_bytes(slot) == theirs[name].num_slot_bytes(slot)
    for name in ours:
        assert ours[name].num_free_bytes == theirs[name].num_free_bytes
        assert ours[name].num_bases == theirs[name].num_bases


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, SLOTS - 1),
            st.sampled_from([0.0, 0.05, 0.3, 1.0, None]),
            st.sampled_from(["abc", "b", "ca", ""]),
            st.integers(0, 2),
        ),
        max_size=20,
    ),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_modules_put_at_once_equal_modules_put_one_by_one(
    actions: list[tuple[int, float | None, str, int]], dtype: torch.dtype
) -> None:
    at_once, one_by_one = make_operands(dtype), make_operands(dtype)
    for seed, (slot, density, names, basis) in enumerate(actions):
        if density is None:
            clear_modules(at_once.values(), slot)
            packed: dict[str, Packed] = {}
        else:
            packed = make_packed(at_once, seed, density, names)
            put_modules(at_once, slot, PackedModules.from_modules(packed), basis)
        for name, module_operands in one_by_one.items():
            if name in packed:
                module_operands.put(slot, packed[name], basis)
                assert at_once[name].basis_of[slot] == basis
            else:
                module_operands.clear(slot)
        assert_same(at_once, one_by_one)


def test_a_module_for_which_only_pieces_are_free_is_cut_at_windows() -> None:
    operands = make_operands()
    one, two = torch.zeros(600, R), torch.zeros(600, R)
    one[:256], two[:512] = 1.0, 2.0
    small, large = (PackedModules.from_modules({"b": operands["b"].pack(sparse(b))}) for b in (one, two))
    operands["b"].reserve(3 * len(small.blocks))
    for slot in range(3):
        put_modules(operands, slot, small, 0)
    pool = operands["b"].pool
    for slot in (0, 2):
        clear_modules(operands.values(), slot)
    put_modules(operands, 3, large, 1)  # as long as both holes together
    assert operands["b"].pool is pool
    assert operands["b"].num_free_bytes == 0
    assert torch.equal(dense(operands, 3)[1], two)
    assert torch.equal(dense(operands, 1)[1], one)
    assert operands["b"].basis_of.tolist() == [0, 0, 0, 1]


def test_a_stored_dense_b_is_updated() -> None:
    operands = make_operands(torch.float32)
    before = {name: module_operands.dense.clone() for name, module_operands in operands.items()}
    packed = make_packed(operands, 0)
    put_modules(operands, 1, PackedModules.from_modules(packed), 0)
    for (name, module_operands), b in zip(operands.items(), dense(operands, 1), strict=True):
        assert torch.equal(module_operands.dense[1], b.T)
        assert b.any()
        assert torch.equal(module_operands.dense[0], before[name][0])


def test_without_the_compiled_module_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it, without = make_operands(), make_operands()
    packed = PackedModules.from_modules(make_packed(with_it, 0))
    put_modules(with_it, 2, packed, 1)
    monkeypatch.setattr(packed_modules, "MODULE", None)
    put_modules(without, 2, packed, 1)
    assert_same(with_it, without)


def test_modules_that_do_not_fit_are_refused_with_every_fault_and_change_nothing() -> None:
    operands = make_operands()
    put_modules(operands, 0, PackedModules.from_modules(make_packed(operands, 0)), 0)
    before = dense(operands, 0)
    other = Operands(1, R + 1, SIZES["a"], torch.bfloat16, "cpu").pack(sparse(torch.ones(SIZES["a"], R)))
    packed = PackedModules.from_modules(make_packed(operands, 1, names="bc") | {"a": other, "unknown": other})
    with pytest.raises(ValueError, match=r"unknown: no operands; a: Layout.*expected Layout.*; basis -1, expected one from 0"):
        put_modules(operands, 0, packed, -1)
    with pytest.raises(ValueError, match=f"for slot {SLOTS} of {SLOTS}"):
        put_modules(operands, SLOTS, PackedModules.from_modules(make_packed(operands, 1)), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, dense(operands, 0), strict=True))


def test_joined_modules_equal_their_parts_and_count_their_bytes() -> None:
    packed = make_packed(make_operands(), 0, 0.1)
    whole = PackedModules.from_modules(packed)
    for name, module in whole.by_module.items():
        assert module.layout == packed[name].layout
        assert torch.equal(module.blocks, packed[name].blocks)
        assert torch.equal(module.starts, packed[name].starts)
    assert whole.num_bytes == sum(module.blocks.nbytes + module.starts.nbytes for module in packed.values())
    assert PackedModules.from_modules({}).num_bytes == 0
