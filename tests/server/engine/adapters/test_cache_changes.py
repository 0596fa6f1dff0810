"""Adapters that an operator inserts, pins and drops while sequences come and go."""

from dataclasses import replace

import pytest

from lori.merge import MergeOptions
from server.engine.adapters.cache import AdapterCache
from server.engine.adapters.residents import NoRoomError, TierUsage
from server.engine.request import Sequence
from tests.server.fake_loads import FakeLoader, FakePool, fake_cache, fake_packed
from tests.server.plans import request


def wanting(*digests: str) -> Sequence:
    return Sequence(request(adapters=digests))


def run(cache: AdapterCache, loader: FakeLoader, *digests: str) -> Sequence:
    """Return a sequence that holds its adapters."""
    sequence = wanting(*digests)
    if cache.acquire(sequence) == "loading":
        for digest in [*loader.pending]:
            loader.arrive(digest)
        cache.collect()
        assert cache.acquire(sequence) == "ready"
    return sequence


def is_empty(cache: AdapterCache) -> bool:
    cache.check_integrity([])
    assert isinstance(cache._pool, FakePool)
    return (
        not cache.tier_usage()
        and not cache.num_loaded_bytes
        and not cache._pool.slots
        and not cache._dropped
        and not cache._merge_parts
    )


def test_an_inserted_adapter_is_resident_and_never_read(loader: FakeLoader) -> None:
    cache, sequence = fake_cache(loader), wanting("a")
    assert cache.insert("a", fake_packed("a", 7))
    assert cache.tier_usage() == {"a": TierUsage(7, 7)}
    assert cache.tier_usage()["a"].tier == "resident"
    assert cache.insert("a", fake_packed("a", 7)), "a second insertion changes nothing"
    assert cache.acquire(sequence) == "ready"
    assert not loader.started
    cache.check_integrity([sequence])


def test_an_adapter_that_is_inserted_while_all_slots_are_used_waits_in_ram(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=1)
    running = run(cache, loader, "a")
    assert not cache.insert("b", fake_packed("b"))
    assert cache.tier_usage()["b"].tier == "loaded"
    cache.release(running)
    assert cache.acquire(wanting("b")) == "ready"


def test_an_inserted_adapter_serves_a_sequence_that_waits_for_it(loader: FakeLoader) -> None:
    cache, sequence = fake_cache(loader), wanting("a")
    assert cache.acquire(sequence) == "loading"
    cache.insert("a", fake_packed("a"))
    assert cache.acquire(sequence) == "ready"
    loader.arrive("a")
    cache.collect()
    cache.check_integrity([sequence])


def test_tier_usage_names_the_tier_of_each_adapter(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=1, max_loaded_bytes=1)
    cache.release(run(cache, loader, "a"))
    assert cache.tier_usage() == {"a": TierUsage(1, 1)}
    cache.acquire(wanting("b"))
    loader.arrive("b")
    cache.collect()
    assert cache.tier_usage() == {"a": TierUsage(0, 1), "b": TierUsage(1, 0)}
    assert [usage.tier for usage in (TierUsage(), TierUsage(1, 0), TierUsage(0, 1))] == ["disk", "loaded", "resident"]


def test_a_pinned_adapter_is_never_evicted(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=2)
    assert cache.pin("a", fake_packed("a"))
    for digest in "bcd":
        cache.release(run(cache, loader, digest))
        assert cache.tier_usage()["a"].tier == "resident"
    cache.residents.unpin("a")
    cache.release(run(cache, loader, "e", "f"))
    assert cache.tier_usage()["a"].tier == "loaded"
    cache.residents.unpin("a")
    cache.check_integrity([])


def test_pins_leave_half_of_the_slots_and_bytes_for_others(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=4, max_bytes=20)
    assert cache.pin("a", fake_packed("a", 6))
    with pytest.raises(
        NoRoomError, match="pinned are 1 adapters of 6 bytes, and this one has 5, expected half at most of 4 slots"
    ):
        cache.pin("b", fake_packed("b", 5))
    assert cache.pin("a", fake_packed("a", 6)), "a second pin of an adapter takes no more room"
    assert cache.pin("c", fake_packed("c", 4))
    with pytest.raises(NoRoomError):
        cache.pin("d", fake_packed("d", 0))
    assert (cache.residents.num_pinned, cache.residents.num_pinned_bytes) == (2, 10)
    cache.check_integrity([])


def test_the_only_slot_cannot_be_pinned(loader: FakeLoader) -> None:
    with pytest.raises(NoRoomError):
        fake_cache(loader, num_slots=1).pin("a", fake_packed("a"))


def test_an_adapter_that_has_no_room_now_is_not_pinned(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=2)
    running = run(cache, loader, "a", "b")
    assert not cache.pin("c", fake_packed("c"))
    assert cache.residents.num_pinned == 0
    cache.release(running)
    assert cache.pin("c", fake_packed("c"))


def test_adapters_that_never_fit_beside_the_pinned_ones_are_refused(loader: FakeLoader) -> None:
    """Their sequence would wait for ever for the room of pinned adapters, and all others behind it."""
    cache = fake_cache(loader, num_slots=4)
    cache.pin("a", fake_packed("a"))
    for digests, is_refused in ((("b", "c", "d", "e"), True), (("a", "b", "c", "d"), False)):
        for digest in digests:
            cache.insert(digest, fake_packed(digest))
        sequence = wanting(*digests)
        assert cache.acquire(sequence) == ("loading" if is_refused else "ready")
        failed = cache.take_failed()
        assert [*failed] == ([sequence] if is_refused else [])
        if is_refused:
            assert "do not fit together in the 3 slots" in failed[sequence]
        cache.release(sequence)


def test_an_unused_adapter_is_freed_as_soon_as_it_is_dropped(loader: FakeLoader) -> None:
    cache = fake_cache(loader)
    cache.release(run(cache, loader, "a"))
    cache.drop("a")
    assert is_empty(cache)
    assert cache.acquire(wanting("a")) == "loading"
    assert loader.started == ["a", "a"], "the next sequence has it read again"


def test_an_adapter_that_is_dropped_in_use_is_freed_when_its_last_sequence_ends(loader: FakeLoader) -> None:
    cache = fake_cache(loader)
    one, other = run(cache, loader, "a"), run(cache, loader, "a")
    cache.drop("a")
    cache.release(one)
    assert cache.tier_usage()["a"].tier == "resident"
    cache.check_integrity([other])
    cache.release(other)
    assert is_empty(cache)


def test_an_adapter_that_is_dropped_while_a_sequence_waits_for_it_is_freed_with_the_sequence(loader: FakeLoader) -> None:
    cache, waiting = fake_cache(loader), wanting("a", "b")
    cache.acquire(waiting)
    loader.arrive("a")
    cache.collect()
    cache.drop("a")
    assert cache.tier_usage()["a"].tier == "loaded"
    cache.release(waiting)
    assert "a" not in cache.tier_usage()
    loader.arrive("b")
    cache.collect()
    cache.drop("b")
    assert is_empty(cache)


def test_an_adapter_that_is_dropped_while_it_is_read_for_no_sequence_does_not_stay(loader: FakeLoader) -> None:
    cache, gone = fake_cache(loader), wanting("a")
    cache.acquire(gone)
    cache.release(gone)
    cache.drop("a")
    loader.arrive("a")
    cache.collect()
    assert is_empty(cache)


def test_a_dropped_adapter_that_could_not_be_read_is_forgotten(loader: FakeLoader) -> None:
    cache, gone = fake_cache(loader), wanting("a")
    cache.acquire(gone)
    cache.release(gone)
    cache.drop("a")
    loader.arrive("a", fault="torn")
    cache.collect()
    assert is_empty(cache)


def test_a_dropped_adapter_that_is_inserted_before_it_is_freed_stays(loader: FakeLoader) -> None:
    cache = fake_cache(loader)
    running = run(cache, loader, "a")
    cache.drop("a")
    cache.insert("a", fake_packed("a"))
    cache.release(running)
    assert cache.tier_usage()["a"].tier == "resident"
    cache.drop("a")
    assert is_empty(cache)


def test_a_pinned_adapter_can_be_dropped(loader: FakeLoader) -> None:
    cache = fake_cache(loader)
    cache.pin("a", fake_packed("a"))
    cache.drop("a")
    assert cache.residents.num_pinned == 0
    assert is_empty(cache)


def test_merges_of_a_dropped_adapter_are_dropped_too(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=4)
    sequences = [
        Sequence(replace(request(adapters=pair), merge=MergeOptions("ties"))) for pair in (("a", "b"), ("b", "c"), ("c", "d"))
    ]
    for sequence in sequences:
        cache.acquire(sequence)
        for digest in [*loader.pending]:
            loader.arrive(digest)
        cache.collect()
        assert cache.acquire(sequence) == "ready"
    cache.drop("b")
    assert len(cache.tier_usage()) == 3, "all three merges are in use"
    for sequence in sequences:
        cache.release(sequence)
    assert [*cache.tier_usage()] == [sequences[2].residents[0][0]]
    cache.drop("d")
    assert is_empty(cache)


def test_evicted_merges_are_forgotten(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=1, max_loaded_bytes=0)
    for number in range(20):
        sequence = Sequence(replace(request(adapters=("a", f"{number}")), merge=MergeOptions("ties")))
        cache.acquire(sequence)
        loader.arrive(*loader.pending)
        cache.collect()
        assert cache.acquire(sequence) == "ready"
        cache.release(sequence)
        cache.collect()
    assert len(cache._merge_parts) <= 3
