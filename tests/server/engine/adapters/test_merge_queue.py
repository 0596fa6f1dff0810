"""Merge queue: merges take no places from adapters that are read, and tenants take turns at merges."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from lori.merge_options import MergeOptions
from server.engine.adapters.cache import MAX_LOADING, MAX_MERGING, AdapterCache, MergeQueue
from server.engine.request import AdapterTerm, Sequence
from server.engine.scheduling.kv_cache import KvCache
from server.engine.scheduling.scheduler import Scheduler
from tests.server.fake_loads import FakeLoader, fake_cache
from tests.server.plans import request, run_step, step_limits


def merging(weight: float, tenant: str = "alice", policy: Iterable[str] = ()) -> Sequence:
    """Return a sequence whose merge differs from those of any other weight or tenant."""
    asked = request(adapters=(f"{tenant} 1", f"{tenant} 2"), weight=weight, tenant=tenant)
    terms = tuple(AdapterTerm(digest, digest, 0.5) for digest in policy)
    return Sequence(replace(asked, merge=MergeOptions("ties"), policy=terms))


def flood(number: int, tenant: str = "alice") -> list[Sequence]:
    return [merging(0.1 + place / 1000, tenant) for place in range(number)]


def wanting(digest: str, tenant: str = "bob") -> Sequence:
    return Sequence(request(adapters=(digest,), tenant=tenant))


def digest_of(sequence: Sequence) -> str:
    assert sequence.merged_digest
    return sequence.merged_digest


def pin_all(cache: AdapterCache, sequences: Iterable[Sequence]) -> None:
    for sequence in sequences:
        assert cache.acquire(sequence) == "loading"
        cache.check_integrity([])


def test_merges_that_wait_keep_no_adapter_from_being_read(loader: FakeLoader) -> None:
    """Regression: another tenant's adapter was read after 200 merges, 100 s late."""
    cache, merges = fake_cache(loader), flood(200)
    pin_all(cache, merges)
    assert loader.started == [digest_of(sequence) for sequence in merges[:MAX_MERGING]]
    others = [wanting(f"{number}") for number in range(MAX_LOADING)]
    pin_all(cache, others)
    assert loader.started[MAX_MERGING:] == [f"{number}" for number in range(MAX_LOADING)]


def test_adapters_that_are_read_keep_no_merge_from_being_built(loader: FakeLoader) -> None:
    cache, merge = fake_cache(loader), merging(1.0)
    pin_all(cache, [wanting(f"{number}") for number in range(2 * MAX_LOADING)])
    pin_all(cache, [merge])
    assert loader.started[MAX_LOADING:] == [digest_of(merge)]


def test_the_merge_of_another_tenant_begins_next(loader: FakeLoader) -> None:
    cache, merges, other = fake_cache(loader, num_slots=9), flood(200), merging(1.0, "bob")
    pin_all(cache, [*merges, other])
    loader.arrive(digest_of(merges[0]))
    cache.collect()
    assert len(loader.started) == MAX_MERGING, "a built merge takes a place until its sequence acquires it"
    assert cache.acquire(merges[0]) == "ready"
    assert loader.started[MAX_MERGING:] == [digest_of(other)]
    cache.check_integrity([merges[0]])


def test_queued_merges_are_deferred_until_they_begin(loader: FakeLoader) -> None:
    cache, merges = fake_cache(loader, num_slots=9), flood(5)
    pin_all(cache, merges)
    assert [cache.is_load_deferred(sequence) for sequence in merges] == [False, False, True, True, True]
    loader.arrive(digest_of(merges[1]))
    cache.collect()
    assert cache.acquire(merges[1]) == "ready"
    assert [cache.is_load_deferred(sequence) for sequence in merges] == [False, False, False, True, True]


def test_a_queued_merge_is_not_deferred_while_its_policy_adapter_may_be_read(loader: FakeLoader) -> None:
    """The operator's policy adds an adapter to every request of a tenant: there is a place for it, though none for the merge."""
    cache, merge = fake_cache(loader, max_loading=1), merging(1.0, "bob", policy=["policy"])
    pin_all(cache, [wanting("a"), *flood(3), merge])
    assert "policy" not in loader.started
    assert cache.is_load_deferred(merge), "there is a place neither for the merge nor for its policy adapter"
    loader.arrive("a", fault="it is torn")
    cache.collect()
    assert not cache.is_load_deferred(merge)
    pin_all(cache, [merge])
    assert loader.started[-1] == "policy"


@pytest.mark.parametrize("end", ["fault", "release", "leave"])
def test_the_place_of_a_merge_that_fails_or_is_cancelled_goes_to_the_next(loader: FakeLoader, end: str) -> None:
    cache, (first, second, third) = fake_cache(loader, max_merging=1), flood(3)
    for sequence in (first, second, third):
        cache.add_request(sequence.request)
    pin_all(cache, [first, second, third])
    if end == "leave":  # The second merge leaves the queue, so it never begins.
        cache.release(second)
        cache.finish_request(second.request)
    if end == "fault":
        loader.arrive(digest_of(first), fault="they differ")
        cache.collect()
    else:
        cache.release(first)
        cache.finish_request(first.request)
    assert loader.started == [digest_of(first), digest_of(third if end == "leave" else second)]
    cache.check_integrity([])


def test_a_queued_merge_that_was_built_meanwhile_is_not_built_again(loader: FakeLoader) -> None:
    cache, (first, second, third) = fake_cache(loader, num_slots=9, max_merging=1), flood(3)
    same = Sequence(second.request)
    pin_all(cache, [first, second, same, third])
    for sequence in (first, second):
        loader.arrive(digest_of(sequence))
        cache.collect()
        assert cache.acquire(sequence) == "ready"
    assert loader.started == [digest_of(sequence) for sequence in (first, second, third)]
    assert not cache.is_load_deferred(same)
    assert cache.acquire(same) == "ready"


def test_merges_and_adapters_that_hold_all_places_do_not_wait_for_each_other(loader: FakeLoader) -> None:
    cache = fake_cache(loader, num_slots=100, max_loading=1, max_merging=1)
    waiting = [merging(weight, tenant, [f"policy of {tenant}"]) for weight in (0.25, 0.5, 1.0) for tenant in ("alice", "bob")]
    for _ in range(20):
        for sequence in [*waiting]:
            if not cache.is_load_deferred(sequence) and cache.acquire(sequence) == "ready":
                cache.release(sequence)
                waiting.remove(sequence)
        for digest in [*loader.pending]:
            loader.arrive(digest)
        cache.collect()
    assert not waiting, "a sequence waits for ever"


def test_other_tenants_are_served_while_one_tenant_has_many_merges_built(loader: FakeLoader) -> None:
    """As in the server, one merge ends at a time. Other tenants' adapters and merges come in between."""
    cache = fake_cache(loader, num_slots=9)
    scheduler = Scheduler(KvCache(500, 4, "base"), cache, step_limits(9, 90))
    merges, cold, other = flood(50), wanting("cold"), merging(1.0, "bob")
    for sequence in merges:
        scheduler.add(sequence)
    run_step(scheduler)
    for sequence in (cold, other):
        scheduler.add(sequence)
    run_step(scheduler)
    loader.arrive("cold")
    cache.collect()
    assert cold in {chunk.sequence for chunk in run_step(scheduler)}
    num_before_other = None
    while scheduler.has_work:
        if loader.pending:
            loader.arrive(next(iter(loader.pending)))
        cache.collect()
        run_step(scheduler)
        if num_before_other is None and other not in scheduler.waiting:
            num_before_other = sum(merge not in scheduler.waiting for merge in merges)
    assert num_before_other == MAX_MERGING, "only the merges that had begun before it arrived go first"
    assert len(loader.started) == len(merges) + 2


def test_tenants_take_turns_at_merges() -> None:
    queue, (a, b, c), (d, e), f = MergeQueue(), flood(3, "alice"), flood(2, "bob"), merging(1.0, "carol")
    for sequence in (a, b, c, d, e, f):
        queue.add(sequence)
    assert [queue.pop([]) for _ in range(7)] == [a, d, f, b, e, c, None]
    assert not queue


def test_a_tenant_whose_merge_is_being_built_comes_after_the_others() -> None:
    queue, (a, b), d = MergeQueue(), flood(2, "alice"), merging(1.0, "bob")
    for sequence in (a, b, d):
        queue.add(sequence)
    assert [queue.pop(["alice"]) for _ in range(4)] == [d, a, b, None]


def test_a_sequence_that_left_the_merge_queue_is_not_popped() -> None:
    queue, (a, b) = MergeQueue(), flood(2)
    queue.discard(a)
    for sequence in (a, b, a):
        queue.add(sequence)
    assert a in queue
    queue.discard(a)
    assert a not in queue
    assert queue.pop([]) is b
    assert not queue
