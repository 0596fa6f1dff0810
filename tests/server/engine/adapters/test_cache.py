"""Adapter cache, from disk to RAM to a slot: reads, evictions, pins and waiting sequences."""

from dataclasses import replace

import pytest

from lori.merge_options import MergeOptions
from server.engine.adapters.cache import MAX_LOADING, AdapterCache
from server.engine.request import AdapterTerm, Sequence
from tests.server.fake_loads import SCALE, FakeLoader, fake_cache
from tests.server.plans import request


def wanting(*digests: str, weight: float = 1.0) -> Sequence:
    return Sequence(request(adapters=digests, weight=weight))


def load(cache: AdapterCache, loader: FakeLoader, *digests: str, num_bytes: int = 1) -> None:
    """Let the loads of `digests` arrive."""
    for digest in digests:
        loader.arrive(digest, num_bytes)
    assert cache.collect()


def run(cache: AdapterCache, loader: FakeLoader, *digests: str, num_bytes: int = 1) -> Sequence:
    """Return a sequence that holds its adapters. Those that are not in memory are read first."""
    sequence = wanting(*digests)
    if cache.acquire(sequence) == "loading":
        load(cache, loader, *[d for d in digests if d in loader.pending], num_bytes=num_bytes)
        assert cache.acquire(sequence) == "ready"
    return sequence


def end(cache: AdapterCache, *sequences: Sequence) -> None:
    for sequence in sequences:
        cache.release(sequence)
    cache.collect()


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


def test_the_base_alone_is_always_ready(loader: FakeLoader) -> None:
    cache, sequence = fake_cache(loader), wanting()
    assert cache.acquire(sequence) == "ready"
    assert sequence.terms == []
    cache.release(sequence)
    cache.check_integrity([])
    assert not loader.started


def test_an_adapter_is_read_then_resident_with_its_scale_in_the_weight(loader: FakeLoader) -> None:
    cache, sequence = fake_cache(loader), wanting("a", "b", weight=0.25)
    seconds: list[float] = []
    cache.observe_load = seconds.append
    assert cache.acquire(sequence) == "loading"
    assert sequence.terms is None
    assert loader.started == ["a", "b"]
    assert cache.acquire(sequence) == "loading"
    assert loader.started == ["a", "b"], "an adapter that is being read is not started again"
    load(cache, loader, "b")
    assert cache.acquire(sequence) == "loading"
    load(cache, loader, "a")
    assert cache.acquire(sequence) == "ready"
    slots = [cache.residents.get(digest).slot for digest in "ab"]
    assert sequence.terms == [(slots[0], 0.25 * SCALE), (slots[1], 0.25 * SCALE)]
    assert seconds == [0.5, 0.5]
    cache.check_integrity([sequence])


def test_a_step_waits_for_an_adapter_that_is_being_read(loader: FakeLoader) -> None:
    cache, sequence = fake_cache(loader, patience_s=0.25), wanting("a")
    loader.arrives_when_awaited = True
    assert not cache.collect()
    assert not loader.waits_s, "nothing is being read, so nothing is waited for"
    assert cache.acquire(sequence) == "loading"
    assert cache.collect()
    assert loader.waits_s == [0.25]
    assert cache.acquire(sequence) == "ready"


def test_a_step_without_a_load_wait_waits_for_nothing(loader: FakeLoader) -> None:
    cache = fake_cache(loader)
    assert cache.acquire(wanting("a")) == "loading"
    assert not cache.collect()
    assert not loader.waits_s


def test_a_failed_prefetch_that_no_sequence_waits_for_is_not_counted_as_a_failure(loader: FakeLoader) -> None:
    cache = fake_cache(loader)
    cache.prefetch(wanting("a").request)
    loader.arrive("a", fault="torn")
    assert cache.collect()
    assert cache.num_failures == 0


def test_an_adapter_of_weight_0_is_not_read(loader: FakeLoader) -> None:
    assert fake_cache(loader).acquire(wanting("a", weight=0.0)) == "ready"
    assert not loader.started


def test_collect_is_false_when_no_load_has_arrived(loader: FakeLoader) -> None:
    cache = fake_cache(loader)
    cache.acquire(wanting("a"))
    assert not cache.collect()


def test_an_adapter_that_two_sequences_wait_for_is_read_once(loader: FakeLoader) -> None:
    cache, one, other = fake_cache(loader), wanting("a"), wanting("a", weight=0.5)
    assert [cache.acquire(one), cache.acquire(other)] == ["loading"] * 2
    load(cache, loader, "a")
    assert [cache.acquire(one), cache.acquire(other)] == ["ready"] * 2
    assert loader.started == ["a"]
    assert one.terms is not None
    assert other.terms == [(one.terms[0][0], 0.5 * SCALE)]
    assert cache.residents.get("a").num_users == 2
    cache.check_integrity([one, other])


def test_two_names_of_one_adapter_share_its_slot(loader: FakeLoader) -> None:
    """Regression: an adapter named together with its alias was put into a second slot, and the engine died."""
    terms = (AdapterTerm("math", "a", 1.0), AdapterTerm("prod", "a", 0.5))
    cache, sequence = fake_cache(loader), Sequence(replace(request(), terms=terms))
    assert cache.acquire(sequence) == "loading"
    load(cache, loader, "a")
    assert cache.acquire(sequence) == "ready"
    slot = cache.residents.get("a").slot
    assert sorted(sequence.terms or ()) == [(slot, 0.5 * SCALE), (slot, SCALE)]
    cache.check_integrity([sequence])
    end(cache, sequence)
    cache.check_integrity([])


def test_equal_merges_are_loaded_once_in_any_order_of_their_adapters(loader: FakeLoader) -> None:
    cache = fake_cache(loader, max_merging=3)
    asked = replace(request(adapters=("a", "b")), merge=MergeOptions("ties"))
    reordered = replace(asked, terms=asked.terms[::-1])
    one, same = Sequence(asked), Sequence(reordered)
    others = [replace(asked, merge=MergeOptions("ties", density=0.25)), replace(asked, merge=MergeOptions("magnitude"))]
    for sequence in (one, same, *map(Sequence, others)):
        assert cache.acquire(sequence) == "loading"
    assert len(loader.started) == len({*loader.started}) == 3
    load(cache, loader, loader.started[0])
    assert [cache.acquire(one), cache.acquire(same)] == ["ready"] * 2
    assert one.terms == same.terms == [(cache.residents.get(loader.started[0]).slot, SCALE)]


def test_an_adapter_that_arrives_after_its_sequence_has_left_stays_in_ram(loader: FakeLoader) -> None:
    cache, sequence = fake_cache(loader), wanting("a")
    assert cache.acquire(sequence) == "loading"
    cache.release(sequence)
    load(cache, loader, "a")
    assert cache.num_loaded == 1
    cache.check_integrity([])
    assert cache.acquire(wanting("a")) == "ready"
    assert loader.started == ["a"]


def test_a_sequence_joins_a_load_that_was_started_for_one_that_has_left(loader: FakeLoader) -> None:
    cache, gone, late = fake_cache(loader), wanting("a"), wanting("a")
    cache.acquire(gone)
    cache.release(gone)
    assert cache.acquire(late) == "loading"
    load(cache, loader, "a")
    assert cache.acquire(late) == "ready"
    assert loader.started == ["a"]


def test_a_fault_fails_all_sequences_that_wait_for_the_adapter_and_no_other(loader: FakeLoader) -> None:
    cache, one, other, fine, gone = fake_cache(loader), wanting("a"), wanting("a", "b"), wanting("b"), wanting("a")
    for sequence in (one, other, fine, gone):
        assert cache.acquire(sequence) == "loading"
    cache.release(gone)
    loader.arrive("a", fault="it is torn")
    loader.arrive("b")
    assert cache.collect()
    assert cache.take_failed() == {one: "adapter 'a' it is torn", other: "adapter 'a' it is torn"}
    assert cache.take_failed() == {}
    for sequence in (one, other):
        cache.release(sequence)
    assert cache.acquire(fine) == "ready"
    cache.check_integrity([fine])


def test_an_adapter_that_could_not_be_read_is_read_again_for_the_next_sequence(loader: FakeLoader) -> None:
    cache, first, second = fake_cache(loader), wanting("a"), wanting("a")
    cache.acquire(first)
    loader.arrive("a", fault="it is torn")
    cache.collect()
    cache.release(first)
    assert cache.acquire(second) == "loading"
    assert loader.started == ["a", "a"]
    load(cache, loader, "a")
    assert cache.acquire(second) == "ready"


def test_the_least_recently_used_adapter_leaves_its_slot(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=2)
    a, b = run(cache, loader, "a"), run(cache, loader, "b")
    end(cache, b, a)
    run(cache, loader, "c")
    assert "a" in cache.residents
    assert "b" not in cache.residents
    assert cache.residents.num_evictions == 1


def test_while_all_slots_are_used_the_next_must_wait(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=2)
    a, b, waiting = run(cache, loader, "a"), run(cache, loader, "b"), wanting("c")
    assert cache.acquire(waiting) == "loading"
    load(cache, loader, "c")
    assert cache.acquire(waiting) == "full"
    cache.check_integrity([a, b])
    assert cache.acquire(wanting("a")) == "ready", "a sequence that needs no slot may overtake"
    cache.release(b)
    assert cache.acquire(waiting) == "ready"
    assert "b" not in cache.residents


def test_while_all_bytes_are_used_the_next_must_wait(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=9, max_bytes=10)
    a, waiting = run(cache, loader, "a", num_bytes=6), wanting("b")
    cache.acquire(waiting)
    load(cache, loader, "b", num_bytes=5)
    assert cache.acquire(waiting) == "full"
    cache.release(a)
    assert cache.acquire(waiting) == "ready"
    cache.check_integrity([waiting])


def test_a_sequence_without_room_for_all_its_adapters_holds_none(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=3)
    running, waiting = run(cache, loader, "a", "b"), wanting("c", "d")
    cache.acquire(waiting)
    load(cache, loader, "c", "d")
    assert cache.acquire(waiting) == "full"
    cache.check_integrity([running])
    other = run(cache, loader, "e")
    cache.check_integrity([running, other])


def test_a_sequence_does_not_evict_its_own_adapters(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=2)
    end(cache, run(cache, loader, "b"), run(cache, loader, "c"))
    sequence = run(cache, loader, "a", "b")  # b is resident, and the least recently used
    assert {digest for digest in "abc" if digest in cache.residents} == {"a", "b"}
    cache.check_integrity([sequence])


def test_an_adapter_that_left_its_slot_returns_from_ram_without_being_read(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=1)
    end(cache, run(cache, loader, "a"))
    end(cache, run(cache, loader, "b"))
    assert cache.acquire(wanting("a")) == "ready"
    assert loader.started == ["a", "b"]


def test_an_adapter_that_left_ram_too_is_read_again(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=1, max_loaded_bytes=1)
    end(cache, run(cache, loader, "a"))
    end(cache, run(cache, loader, "b"))
    assert (cache.num_loaded, cache.num_loaded_bytes) == (1, 1)
    run(cache, loader, "a")
    assert loader.started == ["a", "b", "a"]


def test_a_resident_adapter_needs_no_copy_in_ram(loader: FakeLoader) -> None:
    cache = fake_cache(loader, max_loaded_bytes=0)
    end(cache, run(cache, loader, "a"))
    assert (cache.num_loaded, cache.num_loaded_bytes) == (0, 0)
    assert cache.acquire(wanting("a")) == "ready"
    assert loader.started == ["a"]


def test_ram_holds_the_most_recently_used_adapters(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=1, max_loaded_bytes=2)
    for digest in ("a", "b", "a", "c"):
        end(cache, run(cache, loader, digest))
    assert loader.started == ["a", "b", "c"]
    run(cache, loader, "a")
    assert loader.started == ["a", "b", "c"], "b has left RAM, a has not"


def test_an_adapter_that_a_sequence_waits_for_stays_in_ram_whatever_the_budget(loader: FakeLoader) -> None:
    cache, waiting = fake_cache(loader, max_loaded_bytes=0), wanting("a", "b")
    cache.acquire(waiting)
    load(cache, loader, "a")
    load_again = cache.collect()
    assert not load_again
    assert cache.acquire(waiting) == "loading"
    load(cache, loader, "b")
    assert cache.acquire(waiting) == "ready"
    assert loader.started == ["a", "b"]
    end(cache, waiting)
    assert cache.num_loaded_bytes == 0


def test_an_adapter_that_is_evicted_while_another_is_read_is_read_again(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=2, max_loaded_bytes=0)
    end(cache, run(cache, loader, "a"))
    waiting = wanting("a", "b")
    assert cache.acquire(waiting) == "loading"  # for b
    end(cache, run(cache, loader, "c"), run(cache, loader, "d"))
    assert "a" not in cache.residents
    load(cache, loader, "b")
    assert cache.acquire(waiting) == "loading"  # for a
    load(cache, loader, "a")
    assert cache.acquire(waiting) == "ready"


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


@pytest.mark.parametrize("is_busy", [False, True])
def test_adapters_that_never_fit_together_are_refused_with_the_reason(loader: FakeLoader, is_busy: bool) -> None:
    """Regression: the sequence had to wait, and all others behind it, until nothing ran any more."""
    cache = fake_cache(loader, num_slots=3, max_bytes=10)
    running = [run(cache, loader, "running")] if is_busy else []
    by_bytes, by_slots = wanting("a", "b"), wanting("c", "d", "e", "f")
    for sequence, size in ((by_bytes, 6), (by_slots, 1)):
        assert cache.acquire(sequence) == "loading"
        load(cache, loader, *[*loader.pending], num_bytes=size)
        assert cache.acquire(sequence) == "loading"
        failed = cache.take_failed()
        assert [*failed] == [sequence]
        assert "do not fit together in the 3 slots and 10 bytes" in failed[sequence]
        cache.release(sequence)
        cache.check_integrity(running)


def test_an_adapter_larger_than_the_budget_is_refused(loader: FakeLoader) -> None:
    cache, sequence = fake_cache(loader, max_bytes=10), wanting("a")
    cache.acquire(sequence)
    load(cache, loader, "a", num_bytes=11)
    assert cache.acquire(sequence) == "loading"
    assert [*cache.take_failed()] == [sequence]


def test_a_preempted_sequence_acquires_its_adapters_anew(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=1, max_loaded_bytes=0)
    preempted = run(cache, loader, "a")
    cache.release(preempted)
    assert preempted.terms is None
    end(cache, run(cache, loader, "b"))
    assert cache.acquire(preempted) == "loading"
    load(cache, loader, "a")
    assert cache.acquire(preempted) == "ready"
    cache.check_integrity([preempted])


def test_the_callback_on_arrival_is_called_for_a_load(loader: FakeLoader) -> None:
    cache, events = fake_cache(loader), list[str]()
    cache.on_arrival(lambda: events.append("news"))
    cache.acquire(wanting("a"))
    loader.arrive("a")
    assert events == ["news"]


def test_closing_ends_the_loader(loader: FakeLoader) -> None:
    fake_cache(loader).close()
    assert loader.is_closed


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
