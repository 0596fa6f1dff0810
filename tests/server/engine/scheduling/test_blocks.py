"""Block pool: blocks are conserved, whoever owns them, and cached blocks are found until they are reallocated."""

import random

import pytest

from server.engine.scheduling.kv_cache import BlockPool


def published(pool: BlockPool, *keys: bytes) -> list[int]:
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    return blocks


def find_all(pool: BlockPool, *keys: bytes) -> list[int | None]:
    return [pool.find(key) for key in keys]


def test_a_pool_allocates_exactly_the_blocks_that_it_has() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.allocate(2)
    assert pool.num_available == 1
    pool.release(blocks)
    assert sorted(pool.allocate(3)) == [0, 1, 2]


def test_releasing_the_same_list_again_frees_nothing_twice() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.release(blocks)
    pool.release(blocks)
    assert pool.num_available == 4
    pool.check_integrity([])


def test_releasing_a_block_without_an_owner_is_an_assertion_error() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError):
        pool.release([block])


def test_a_shared_block_is_available_when_its_last_owner_has_left() -> None:
    pool = BlockPool(2)
    first = published(pool, b"a")
    second = list(first)
    pool.acquire(second)
    pool.check_integrity([first, second])
    pool.release(first)
    assert pool.num_available == 1
    pool.release(second)
    assert pool.num_available == 2


def test_a_published_block_is_found_after_its_owner_has_left() -> None:
    pool = BlockPool(2)
    (block,) = published(pool, b"a")
    pool.release([block])
    assert pool.find(b"a") == block
    assert pool.find(b"b") is None
    assert pool.num_cached == 1
    pool.acquire([block])
    assert pool.num_cached == 0
    pool.check_integrity([[block]])


def test_of_two_blocks_of_one_key_the_first_is_found_and_the_other_is_only_freed() -> None:
    pool = BlockPool(2)
    first, second = published(pool, b"a", b"a")
    assert pool.find(b"a") == first
    pool.release([second])
    assert (pool.num_cached, pool.num_available) == (0, 1)
    pool.release([first])
    assert (pool.num_cached, pool.num_available) == (1, 2)
    pool.check_integrity([])


def test_free_blocks_are_allocated_first_and_then_the_least_recently_released() -> None:
    pool = BlockPool(4)
    early, late = published(pool, b"a"), published(pool, b"b")
    pool.release(early)
    pool.release(late)
    owned = pool.allocate(2)
    assert None not in find_all(pool, b"a", b"b"), "two blocks were free"
    owned += pool.allocate(1)
    assert [block is None for block in find_all(pool, b"a", b"b")] == [True, False]
    pool.check_integrity([owned])


def test_a_block_that_is_used_again_stays_cached_longer() -> None:
    pool = BlockPool(2)
    (early,), (late,) = published(pool, b"a"), published(pool, b"b")
    pool.release([early])
    pool.release([late])
    pool.acquire([early])
    pool.release([early])
    pool.allocate(1)
    assert [block is None for block in find_all(pool, b"a", b"b")] == [False, True]


def test_the_end_of_a_chain_is_reallocated_before_its_beginning() -> None:
    pool = BlockPool(3)
    pool.release(published(pool, b"a", b"b", b"c"))
    for lost in (1, 2, 3):
        pool.allocate(1)
        assert [block is None for block in find_all(pool, b"a", b"b", b"c")] == [False] * (3 - lost) + [True] * lost


@pytest.mark.parametrize("fault", ["lost", "stolen", "doubled"])
def test_the_integrity_check_notices_wrong_owners(fault: str) -> None:
    pool = BlockPool(4)
    blocks = published(pool, b"a", b"b")
    pool.check_integrity([blocks])
    owners = {"lost": [blocks[:1]], "stolen": [[*blocks, 3]], "doubled": [blocks, blocks[:1]]}
    with pytest.raises(AssertionError):
        pool.check_integrity(owners[fault])


@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_lost_and_none_is_allocated_to_two_owners(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(rng.randint(1, 40))
    owners: list[list[int]] = []
    for step in range(300):
        if (kind := rng.random()) < 0.4 and (count := rng.randint(0, 3)) <= pool.num_available:
            before = {block for blocks in owners for block in blocks}
            owners.append(pool.allocate(count))
            assert not before & set(owners[-1]), "an allocated block has no other owner"
            for block in owners[-1]:
                if rng.random() < 0.7:
                    pool.publish(block, bytes([rng.randrange(30)]))
        elif kind < 0.7 and (block := pool.find(bytes([rng.randrange(30)]))) is not None:
            pool.acquire([block])
            owners.append([block])
        elif owners:
            pool.release(owners.pop(rng.randrange(len(owners))))
        pool.check_integrity(owners)
        assert pool.num_available == pool.num_blocks - len({block for blocks in owners for block in blocks}), step
    for blocks in owners:
        pool.release(blocks)
    assert sorted(pool.allocate(pool.num_blocks)) == list(range(pool.num_blocks))
