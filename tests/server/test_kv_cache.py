"""Blocks of KV memory are conserved."""

import random

import pytest

from server.engine.kv_cache import BlockAllocator


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10), (161, 11)])
def test_tokens_take_whole_blocks(num_tokens: int, num_blocks: int) -> None:
    allocator = BlockAllocator(16, 16)
    assert allocator.num_needed(num_tokens) == num_blocks
    assert len(allocator.allocate(num_tokens)) == num_blocks
    assert allocator.num_free == 16 - num_blocks


def test_it_holds_exactly_what_it_has() -> None:
    allocator = BlockAllocator(3, 4)
    assert allocator.can_hold(12)
    assert not allocator.can_hold(13)
    blocks = allocator.allocate(5)
    assert allocator.can_hold(4)
    assert not allocator.can_hold(5)
    allocator.release(blocks)
    assert allocator.can_hold(12)


def test_more_than_what_is_free_is_our_own_fault() -> None:
    allocator = BlockAllocator(2, 4)
    with pytest.raises(AssertionError):
        allocator.allocate(9)
    assert allocator.num_free == 2


def test_usage_is_the_owned_share() -> None:
    allocator = BlockAllocator(4, 8)
    assert allocator.usage == 0
    blocks = allocator.allocate(17)
    assert allocator.usage == 0.75
    allocator.release(blocks)
    assert allocator.usage == 0


def test_releasing_the_same_list_again_gives_nothing_twice() -> None:
    allocator = BlockAllocator(4, 8)
    blocks = allocator.allocate(16)
    allocator.release(blocks)
    allocator.release(blocks)
    assert allocator.num_free == 4
    assert sorted(allocator.allocate(32)) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_owned_twice_and_none_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    allocator = BlockAllocator(rng.randint(1, 40), rng.randint(1, 8))
    owned: list[list[int]] = []
    for _ in range(300):
        num_tokens = rng.randint(0, 3 * allocator.block_size)
        if rng.random() < 0.6 and allocator.can_hold(num_tokens):
            owned.append(allocator.allocate(num_tokens))
        elif owned:
            allocator.release(owned.pop(rng.randrange(len(owned))))
        taken = [block for blocks in owned for block in blocks]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(allocator.num_blocks))
        assert len(taken) + allocator.num_free == allocator.num_blocks
    for blocks in owned:
        allocator.release(blocks)
    assert sorted(allocator.allocate(allocator.num_blocks * allocator.block_size)) == list(range(allocator.num_blocks))
