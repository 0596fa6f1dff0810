"""KV cache: the blocks that a sequence finds computed, and those that it never finds."""

from dataclasses import replace

import pytest

from server.engine.request import Request, Sequence
from server.engine.scheduling.kv_cache import KvCache, block_key
from tests.server.plans import request


def computed(cache: KvCache, request: Request, num_tokens: int | None = None) -> Sequence:
    """Return a sequence in `cache` whose prompt, or `num_tokens` of it, is computed."""
    sequence = Sequence(request)
    cache.allocate(sequence, cache.find_prefix(sequence))
    cache.publish(sequence, sequence.num_computed, len(request.prompt_ids) if num_tokens is None else num_tokens)
    return sequence


def num_found(cache: KvCache, request: Request) -> int:
    return len(cache.find_prefix(Sequence(request)))


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (15, 1), (16, 1), (17, 2), (160, 10), (161, 11)])
def test_tokens_take_whole_blocks(num_tokens: int, num_blocks: int) -> None:
    cache = KvCache(16, 16, "base")
    assert cache.num_needed(num_tokens) == num_blocks
    assert len(computed(cache, request(num_tokens)).blocks) == num_blocks
    assert cache.num_available == 16 - num_blocks


def test_usage_is_the_owned_share() -> None:
    cache = KvCache(4, 8, "base")
    assert cache.usage == 0
    sequence = computed(cache, request(17))
    assert cache.usage == 0.75
    cache.free(sequence)
    assert cache.usage == 0
    assert cache.num_cached == 2


@pytest.mark.parametrize(("num_prompt", "num_blocks"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (99, 3)])
def test_the_longest_run_of_full_blocks_is_found_but_never_the_last_token(num_prompt: int, num_blocks: int) -> None:
    cache = KvCache(64, 4, "base")
    first = computed(cache, request(15))
    other = Sequence(request(num_prompt))
    prefix = cache.find_prefix(other)
    assert prefix == first.blocks[:num_blocks]
    cache.allocate(other, prefix)
    assert other.num_computed == other.num_cached == 4 * num_blocks
    cache.check_integrity([first, other])
    assert set(first.blocks) & set(other.blocks) == set(first.blocks[:num_blocks])


def test_only_computed_blocks_are_found() -> None:
    cache = KvCache(64, 4, "base")
    computed(cache, request(15), num_tokens=7)
    assert num_found(cache, request(15)) == 1


def test_blocks_are_found_by_output_tokens_too() -> None:
    cache = KvCache(64, 4, "base")
    sequence = computed(cache, request(6))
    sequence.output_ids = [6, 7, 8]
    for start in (6, 7):
        cache.publish(sequence, start, start + 1)
    assert num_found(cache, request(9)) == 2, "the other prompt continues with the tokens of this output"


@pytest.mark.parametrize(
    "other",
    [
        request(20, text=1),
        request(20),
        request(20, adapters=["m"], weight=0.5),
        request(20, adapters=["n"]),
        request(20, adapters=["m", "n"]),
    ],
    ids=["text", "base", "weight", "adapter", "more adapters"],
)
def test_other_tokens_adapters_or_weights_find_nothing(other: Request) -> None:
    cache = KvCache(64, 4, "base")
    computed(cache, request(20, adapters=["m"]))
    assert num_found(cache, request(20, adapters=["m"])) == 4
    assert num_found(cache, other) == 0


def test_an_adapter_of_weight_zero_is_as_good_as_none() -> None:
    cache = KvCache(64, 4, "base")
    computed(cache, request(20))
    assert num_found(cache, request(20, adapters=["m"], weight=0)) == 4


def test_another_base_has_other_keys() -> None:
    keys = []
    for base in ("one", "two"):
        cache = KvCache(64, 4, base)
        keys.append(computed(cache, request(20)).block_keys)
    assert not set(keys[0]) & set(keys[1])


def test_a_key_stands_for_all_tokens_before_it() -> None:
    cache = KvCache(64, 4, "base")
    sequence = computed(cache, request(12))
    again = Sequence(request(12, text=1))
    cache.find_prefix(again)
    assert block_key(again.block_keys[0], sequence.ids(4, 8)) != sequence.block_keys[1]
    assert len(set(sequence.block_keys)) == 3


def test_a_sequence_whose_prompt_is_scored_finds_no_blocks_but_its_own_are_found() -> None:
    cache = KvCache(64, 4, "base")
    computed(cache, request(20))
    scored = computed(cache, request(20, text=1, is_scored=True))
    assert num_found(cache, request(20, is_scored=True)) == 0
    assert num_found(cache, request(20, text=1)) == 4
    assert len(cache.find_prefix(Sequence(request(20, text=1, is_scored=True), choice=1))) == 4, "only the first choice is scored"
    cache.free(scored)
    scored.output_ids.append(7)
    assert len(cache.find_prefix(scored)) == 5, "its prompt is scored already"


def test_of_two_sequences_with_equal_tokens_the_blocks_of_the_first_are_found() -> None:
    cache = KvCache(64, 4, "base")
    first, second = Sequence(request(9)), Sequence(request(9))
    for sequence in (first, second):
        cache.allocate(sequence, [])
    for sequence in (first, second):
        cache.publish(sequence, 0, 9)
    assert cache.find_prefix(Sequence(request(9))) == first.blocks[:2]
    cache.free(second)
    assert cache.num_cached == 0
    cache.check_integrity([first])


def test_room_counts_shared_blocks_once_and_cached_blocks_as_taken() -> None:
    cache = KvCache(6, 4, "base")
    first = computed(cache, request(13))  # 4 blocks, 3 of them full
    other = Sequence(request(17))  # 5 blocks, 3 of them shared
    assert cache.has_room(other, cache.find_prefix(other), headroom=0)
    assert not cache.has_room(other, cache.find_prefix(other), headroom=1)
    assert not cache.has_room(other, [], headroom=0)
    cache.free(first)
    assert cache.has_room(other, cache.find_prefix(other), headroom=1), "it takes 3 cached blocks and 2 new ones, so one is left"
    assert not cache.has_room(other, cache.find_prefix(other), headroom=2)


def test_a_sequence_grows_while_there_are_blocks() -> None:
    cache = KvCache(2, 4, "base")
    sequence = computed(cache, request(4))
    assert not cache.needs_block(sequence)
    sequence.output_ids.append(7)
    assert cache.needs_block(sequence)
    assert cache.grow(sequence)
    assert not cache.needs_block(sequence)
    sequence.output_ids += [7] * 4
    assert not cache.grow(sequence)


def test_prefix_query_and_hit_tokens_are_counted_once_per_sequence() -> None:
    cache = KvCache(64, 4, "base")
    computed(cache, request(10))
    assert (cache.num_prefix_query_tokens, cache.num_prefix_hit_tokens) == (10, 0)
    again = computed(cache, request(11))
    assert (cache.num_prefix_query_tokens, cache.num_prefix_hit_tokens) == (21, 8)
    computed(cache, request(30, is_scored=True))
    cache.free(again)
    again.num_preemptions = 1
    cache.allocate(again, cache.find_prefix(again))
    assert (cache.num_prefix_query_tokens, cache.num_prefix_hit_tokens) == (21, 8)
    assert again.num_cached == 8


def test_integrity_notices_a_lost_block() -> None:
    cache = KvCache(8, 4, "base")
    sequence = computed(cache, request(9))
    sequence.blocks.pop()
    with pytest.raises(AssertionError):
        cache.check_integrity([sequence])


def test_a_tenant_finds_no_blocks_of_another_tenant() -> None:
    cache = KvCache(64, 4, "base")
    computed(cache, replace(request(15), tenant="acme"))
    assert num_found(cache, replace(request(15), tenant="acme")) == 3
    assert num_found(cache, replace(request(15), tenant="other")) == num_found(cache, request(15)) == 0
