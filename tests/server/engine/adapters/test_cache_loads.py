"""Loads of the adapter cache: their limit, the sequences that it defers, prefetches, and merges that are cancelled."""

from dataclasses import replace

import pytest

from lori.merge_options import MergeOptions
from server.engine.adapters.cache import MAX_LOADING, AdapterCache
from server.engine.request import Sequence
from tests.server.fake_loads import FakeLoader, end, fake_cache, load, run, wanting
from tests.server.plans import request


def test_a_failed_prefetch_that_no_sequence_waits_for_is_not_counted_as_a_failure(loader: FakeLoader) -> None:
    cache = fake_cache(loader)
    cache.prefetch(wanting("a").request)
    loader.arrive("a", fault="torn")
    assert cache.collect()
    assert cache.num_failures == 0


def test_no_more_adapters_are_read_at_a_time_than_the_limit(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=100)
    waiting = [wanting(f"{number}") for number in range(MAX_LOADING + 3)]
    assert {cache.acquire(sequence) for sequence in waiting} == {"loading"}
    assert len(loader.started) == MAX_LOADING
    load(cache, loader, "0", "1")
    assert [cache.acquire(sequence) for sequence in waiting[:3]] == ["ready", "ready", "loading"]
    for sequence in waiting[MAX_LOADING:]:
        cache.acquire(sequence)
    assert len(loader.started) == MAX_LOADING + 2
    assert cache.acquire(wanting("0")) == "ready", "a resident adapter needs no reading"


def test_a_sequence_is_deferred_while_all_places_are_taken_and_its_adapter_is_not_being_read(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=10, max_loading=2)
    resident = run(cache, loader, "r")
    first, second = wanting("a"), wanting("b")
    late, both, same = wanting("c"), wanting("r", "c"), wanting("r", "b")
    assert cache.acquire(first) == "loading"
    assert not any(cache.is_load_deferred(sequence) for sequence in (first, late)), "one more adapter may be read"
    assert cache.acquire(second) == "loading"
    assert cache.is_load_deferred(late)
    assert cache.is_load_deferred(both)
    assert not any(cache.is_load_deferred(sequence) for sequence in (first, second, same))
    load(cache, loader, "a")
    assert not cache.is_load_deferred(first)
    assert cache.is_load_deferred(late)
    assert cache.acquire(first) == "ready"
    assert not cache.is_load_deferred(late)
    end(cache, resident, first)


def test_the_sequence_that_waits_longest_is_not_deferred(loader: FakeLoader) -> None:
    """The longest-waiting sequence may exceed the limit of loads, so the scheduler has to ask about it."""
    cache = fake_cache(loader, num_slots=10, max_loading=1)
    one = wanting("a", "b")
    assert cache.acquire(one) == "loading"
    assert not cache.is_load_deferred(one)


@pytest.mark.parametrize("fault", ["", "it is torn"])
def test_loads_that_no_sequence_waits_for_any_more_free_their_places(loader: FakeLoader, fault: str) -> None:
    cache = fake_cache(loader, num_slots=100)
    gone = [wanting(f"{number}") for number in range(MAX_LOADING)]
    for sequence in gone:
        cache.acquire(sequence)
    for sequence in gone:
        cache.release(sequence)
    late = wanting("late")
    assert cache.acquire(late) == "loading"
    assert "late" not in loader.started
    for digest in [*loader.pending]:
        loader.arrive(digest, fault=fault)
    assert cache.collect()
    assert cache.acquire(late) == "loading"
    assert "late" in loader.started


def merging(*digests: str) -> Sequence:
    return Sequence(replace(request(adapters=digests), merge=MergeOptions("ties")))


def test_a_merge_that_no_request_wants_any_more_is_cancelled_and_frees_its_place(loader: FakeLoader) -> None:
    cache = fake_cache(loader, max_merging=1)
    one, other, late = merging("a", "b"), merging("a", "b"), merging("late")
    (digest, _), *_ = one.residents
    for sequence in (one, other):
        cache.add_request(sequence.request)
    cache.acquire(one)
    cache.release(one)
    cache.finish_request(one.request)
    assert loader.cancelled == [], "the other request wants the merge, though its sequence has not acquired it yet"
    cache.finish_request(other.request)
    assert loader.cancelled == [digest]
    cache.acquire(late)
    assert loader.started == [digest, late.merged_digest]


def test_a_merge_that_was_prefetched_for_a_request_that_ended_is_cancelled(loader: FakeLoader) -> None:
    cache, gone = fake_cache(loader), merging("a", "b")
    cache.prefetch(gone.request)
    cache.add_request(gone.request)
    cache.finish_request(gone.request)
    assert loader.cancelled == [gone.residents[0][0]]


def test_a_cancelled_merge_is_built_again_for_the_next_request(loader: FakeLoader) -> None:
    cache, gone, again = fake_cache(loader), merging("a", "b"), merging("a", "b")
    (digest, _), *_ = gone.residents
    cache.add_request(gone.request)
    cache.acquire(gone)
    cache.drop(digest)
    cache.release(gone)
    cache.finish_request(gone.request)
    cache.add_request(again.request)
    assert cache.acquire(again) == "loading"
    assert loader.started == [digest, digest]
    load(cache, loader, digest)
    assert cache.acquire(again) == "ready"
    cache.release(again)
    cache.finish_request(again.request)
    assert loader.cancelled == [digest], "a merge that was built stays"
    assert cache.tier_usage()[digest].tier == "resident"


def settle_all(cache: AdapterCache, loader: FakeLoader, waiting: list[Sequence]) -> None:
    """Acquire and load repeatedly, as a scheduler does, until no sequence waits. A sequence that is ready ends at once."""
    for _ in range(20):
        for sequence in [*waiting]:
            if cache.acquire(sequence) == "ready":
                cache.release(sequence)
                waiting.remove(sequence)
        for digest in [*loader.pending]:
            loader.arrive(digest)
        cache.collect()
    assert not waiting, "a sequence waits for ever"


def test_one_sequence_may_want_more_adapters_than_the_limit(loader: FakeLoader) -> None:
    """Regression: the adapters already loaded held all places, and the sequence waited for the rest for ever."""
    cache = fake_cache(loader, num_slots=100)
    settle_all(cache, loader, [wanting(*(f"{number}" for number in range(2 * MAX_LOADING)))])


def test_sequences_that_together_hold_all_places_do_not_wait_for_each_other(loader: FakeLoader) -> None:
    """Regression: each sequence had some of its adapters in RAM, and no place was left to read the others."""
    cache = fake_cache(loader, num_slots=20, max_loaded_bytes=20)
    first, second = ([f"{letter}{number}" for number in range(4)] for letter in "ab")
    end(cache, run(cache, loader, *first, *second))
    between = [f"between {number}" for number in range(20)]
    for digest in between:  # fills RAM instead of the adapters above, which are then resident only
        cache.acquire(passing := wanting(digest))
        cache.release(passing)
        load(cache, loader, digest)
    one, other = wanting(*first, "one"), wanting(*second, *(f"{number}" for number in range(MAX_LOADING - 1)))
    assert [cache.acquire(one), cache.acquire(other)] == ["loading"] * 2
    end(cache, run(cache, loader, *between))
    assert not any(digest in cache.residents for digest in (*first, *second))
    settle_all(cache, loader, [one, other])


def test_the_adapters_of_a_request_are_prefetched_once(loader: FakeLoader) -> None:
    cache, sequence = fake_cache(loader), wanting("a", "b")
    cache.prefetch(sequence.request)
    cache.prefetch(sequence.request)
    assert loader.started == ["a", "b"]
    load(cache, loader, "a")
    assert cache.acquire(sequence) == "loading"
    cache.prefetch(sequence.request)
    assert loader.started == ["a", "b"], "one adapter is in RAM, the other is being read"
    load(cache, loader, "b")
    assert cache.acquire(sequence) == "ready"
    cache.prefetch(sequence.request)
    assert loader.started == ["a", "b"]
    cache.check_integrity([sequence])


def test_nothing_is_prefetched_while_anything_is_read(loader: FakeLoader) -> None:
    """A prefetch would delay the adapters of sequences that have waited longer."""
    cache = fake_cache(loader, max_loading=2)
    cache.prefetch(wanting("a", "b", "c").request)
    cache.prefetch(wanting("d").request)
    assert loader.started == ["a", "b"]
    load(cache, loader, "a", "b")
    cache.prefetch(wanting("d").request)
    assert loader.started == ["a", "b", "d"]
