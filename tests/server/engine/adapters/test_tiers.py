"""From disk to RAM to a slot: what is read when, what stays, what goes, and who waits for what."""

from dataclasses import replace

import pytest

from lori.merge_options import MergeOptions
from server.engine.adapters.cache import MAX_LOADING, AdapterTiers
from server.engine.request import AdapterTerm, Sequence
from tests.server.fake_loads import SCALE, FakeLoader, fake_tiers
from tests.server.plans import request


def wanting(*digests: str, weight: float = 1.0) -> Sequence:
    return Sequence(request(adapters=digests, weight=weight))


def load(tiers: AdapterTiers, loader: FakeLoader, *digests: str, num_bytes: int = 1) -> None:
    """What is asked for arrives."""
    for digest in digests:
        loader.arrive(digest, num_bytes)
    assert tiers.collect()


def run(tiers: AdapterTiers, loader: FakeLoader, *digests: str, num_bytes: int = 1) -> Sequence:
    """Returns a sequence whose adapters were read, if they had to be, and are pinned."""
    sequence = wanting(*digests)
    if tiers.acquire(sequence) == "loading":
        load(tiers, loader, *[d for d in digests if d in loader.pending], num_bytes=num_bytes)
        assert tiers.acquire(sequence) == "ready"
    return sequence


def end(tiers: AdapterTiers, *sequences: Sequence) -> None:
    for sequence in sequences:
        tiers.release(sequence)
    tiers.collect()


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


def test_the_base_alone_is_always_ready(loader: FakeLoader) -> None:
    tiers, sequence = fake_tiers(loader), wanting()
    assert tiers.acquire(sequence) == "ready"
    assert sequence.terms == []
    tiers.release(sequence)
    tiers.check_integrity([])
    assert not loader.started


def test_an_adapter_is_read_then_resident_with_its_scale_in_the_weight(loader: FakeLoader) -> None:
    tiers, sequence = fake_tiers(loader), wanting("a", "b", weight=0.25)
    seconds: list[float] = []
    tiers.observe_load = seconds.append
    assert tiers.acquire(sequence) == "loading"
    assert sequence.terms is None
    assert loader.started == ["a", "b"]
    assert tiers.acquire(sequence) == "loading"
    assert loader.started == ["a", "b"], "once is enough"
    load(tiers, loader, "b")
    assert tiers.acquire(sequence) == "loading"
    load(tiers, loader, "a")
    assert tiers.acquire(sequence) == "ready"
    slots = [tiers.residents.get(digest).slot for digest in "ab"]
    assert sequence.terms == [(slots[0], 0.25 * SCALE), (slots[1], 0.25 * SCALE)]
    assert seconds == [0.5, 0.5]
    tiers.check_integrity([sequence])


def test_a_step_waits_for_what_is_being_read(loader: FakeLoader) -> None:
    tiers, sequence = fake_tiers(loader, patience_s=0.25), wanting("a")
    loader.arrives_when_awaited = True
    assert not tiers.collect()
    assert not loader.waits_s, "nothing is read"
    assert tiers.acquire(sequence) == "loading"
    assert tiers.collect()
    assert loader.waits_s == [0.25]
    assert tiers.acquire(sequence) == "ready"


def test_a_step_without_patience_waits_for_nothing(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader)
    assert tiers.acquire(wanting("a")) == "loading"
    assert not tiers.collect()
    assert not loader.waits_s


def test_a_reading_that_failed_before_anybody_asked_for_it_is_no_failure(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader)
    tiers.prefetch(wanting("a").request)
    loader.arrive("a", fault="torn")
    assert tiers.collect()
    assert tiers.num_failures == 0


def test_an_adapter_of_weight_0_is_not_read(loader: FakeLoader) -> None:
    assert fake_tiers(loader).acquire(wanting("a", weight=0.0)) == "ready"
    assert not loader.started


def test_nothing_new_is_nothing_to_look_at(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader)
    tiers.acquire(wanting("a"))
    assert not tiers.collect()


def test_two_who_wait_for_one_adapter_have_it_read_once(loader: FakeLoader) -> None:
    tiers, one, other = fake_tiers(loader), wanting("a"), wanting("a", weight=0.5)
    assert [tiers.acquire(one), tiers.acquire(other)] == ["loading"] * 2
    load(tiers, loader, "a")
    assert [tiers.acquire(one), tiers.acquire(other)] == ["ready"] * 2
    assert loader.started == ["a"]
    assert one.terms is not None
    assert other.terms == [(one.terms[0][0], 0.5 * SCALE)]
    assert tiers.residents.get("a").num_users == 2
    tiers.check_integrity([one, other])


def test_two_names_of_one_adapter_share_its_slot(loader: FakeLoader) -> None:
    """An alias beside the name that it means: the second one was put into a slot again, and the engine died."""
    terms = (AdapterTerm("math", "a", 1.0), AdapterTerm("prod", "a", 0.5))
    tiers, sequence = fake_tiers(loader), Sequence(replace(request(), terms=terms))
    assert tiers.acquire(sequence) == "loading"
    load(tiers, loader, "a")
    assert tiers.acquire(sequence) == "ready"
    slot = tiers.residents.get("a").slot
    assert sorted(sequence.terms or ()) == [(slot, 0.5 * SCALE), (slot, SCALE)]
    tiers.check_integrity([sequence])
    end(tiers, sequence)
    tiers.check_integrity([])


def test_a_merge_is_loaded_once_by_what_it_is(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, max_merging=3)
    asked = replace(request(adapters=("a", "b")), merge=MergeOptions("ties"))
    turned = replace(asked, terms=asked.terms[::-1])
    one, same = Sequence(asked), Sequence(turned)
    others = [replace(asked, merge=MergeOptions("ties", density=0.25)), replace(asked, merge=MergeOptions("magnitude"))]
    for sequence in (one, same, *map(Sequence, others)):
        assert tiers.acquire(sequence) == "loading"
    assert len(loader.started) == len({*loader.started}) == 3
    load(tiers, loader, loader.started[0])
    assert [tiers.acquire(one), tiers.acquire(same)] == ["ready"] * 2
    assert one.terms == same.terms == [(tiers.residents.get(loader.started[0]).slot, SCALE)]


def test_an_adapter_that_comes_after_its_sequence_has_left_is_kept(loader: FakeLoader) -> None:
    tiers, sequence = fake_tiers(loader), wanting("a")
    assert tiers.acquire(sequence) == "loading"
    tiers.release(sequence)
    load(tiers, loader, "a")
    assert tiers.num_loaded == 1
    tiers.check_integrity([])
    assert tiers.acquire(wanting("a")) == "ready"
    assert loader.started == ["a"]


def test_who_asks_while_it_is_read_for_one_that_has_left_waits_for_that(loader: FakeLoader) -> None:
    tiers, gone, late = fake_tiers(loader), wanting("a"), wanting("a")
    tiers.acquire(gone)
    tiers.release(gone)
    assert tiers.acquire(late) == "loading"
    load(tiers, loader, "a")
    assert tiers.acquire(late) == "ready"
    assert loader.started == ["a"]


def test_a_fault_is_that_of_all_who_wait_for_it_and_of_no_other(loader: FakeLoader) -> None:
    tiers, one, other, fine, gone = fake_tiers(loader), wanting("a"), wanting("a", "b"), wanting("b"), wanting("a")
    for sequence in (one, other, fine, gone):
        assert tiers.acquire(sequence) == "loading"
    tiers.release(gone)
    loader.arrive("a", fault="it is torn")
    loader.arrive("b")
    assert tiers.collect()
    assert tiers.take_failed() == {one: "adapter 'a' it is torn", other: "adapter 'a' it is torn"}
    assert tiers.take_failed() == {}
    for sequence in (one, other):
        tiers.release(sequence)
    assert tiers.acquire(fine) == "ready"
    tiers.check_integrity([fine])


def test_what_could_not_be_read_is_read_again_for_the_next_who_asks(loader: FakeLoader) -> None:
    tiers, first, second = fake_tiers(loader), wanting("a"), wanting("a")
    tiers.acquire(first)
    loader.arrive("a", fault="it is torn")
    tiers.collect()
    tiers.release(first)
    assert tiers.acquire(second) == "loading"
    assert loader.started == ["a", "a"]
    load(tiers, loader, "a")
    assert tiers.acquire(second) == "ready"


def test_the_adapter_unused_longest_leaves_its_slot(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=2)
    a, b = run(tiers, loader, "a"), run(tiers, loader, "b")
    end(tiers, b, a)
    run(tiers, loader, "c")
    assert "a" in tiers.residents
    assert "b" not in tiers.residents
    assert tiers.residents.num_evictions == 1


def test_while_all_slots_are_used_the_next_must_wait(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=2)
    a, b, waiting = run(tiers, loader, "a"), run(tiers, loader, "b"), wanting("c")
    assert tiers.acquire(waiting) == "loading"
    load(tiers, loader, "c")
    assert tiers.acquire(waiting) == "full"
    tiers.check_integrity([a, b])
    assert tiers.acquire(wanting("a")) == "ready", "who needs no slot may pass"
    tiers.release(b)
    assert tiers.acquire(waiting) == "ready"
    assert "b" not in tiers.residents


def test_while_all_bytes_are_used_the_next_must_wait(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=9, max_bytes=10)
    a, waiting = run(tiers, loader, "a", num_bytes=6), wanting("b")
    tiers.acquire(waiting)
    load(tiers, loader, "b", num_bytes=5)
    assert tiers.acquire(waiting) == "full"
    tiers.release(a)
    assert tiers.acquire(waiting) == "ready"
    tiers.check_integrity([waiting])


def test_who_finds_no_room_for_all_holds_none(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=3)
    running, waiting = run(tiers, loader, "a", "b"), wanting("c", "d")
    tiers.acquire(waiting)
    load(tiers, loader, "c", "d")
    assert tiers.acquire(waiting) == "full"
    tiers.check_integrity([running])
    other = run(tiers, loader, "e")
    tiers.check_integrity([running, other])


def test_its_own_adapters_do_not_go_for_one_another(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=2)
    end(tiers, run(tiers, loader, "b"), run(tiers, loader, "c"))
    sequence = run(tiers, loader, "a", "b")  # b is there, the one unused longest
    assert {digest for digest in "abc" if digest in tiers.residents} == {"a", "b"}
    tiers.check_integrity([sequence])


def test_what_left_its_slot_is_put_back_from_ram_unread(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=1)
    end(tiers, run(tiers, loader, "a"))
    end(tiers, run(tiers, loader, "b"))
    assert tiers.acquire(wanting("a")) == "ready"
    assert loader.started == ["a", "b"]


def test_what_left_ram_too_is_read_again(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=1, max_loaded_bytes=1)
    end(tiers, run(tiers, loader, "a"))
    end(tiers, run(tiers, loader, "b"))
    assert (tiers.num_loaded, tiers.num_loaded_bytes) == (1, 1)
    run(tiers, loader, "a")
    assert loader.started == ["a", "b", "a"]


def test_a_resident_adapter_needs_no_copy_in_ram(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, max_loaded_bytes=0)
    end(tiers, run(tiers, loader, "a"))
    assert (tiers.num_loaded, tiers.num_loaded_bytes) == (0, 0)
    assert tiers.acquire(wanting("a")) == "ready"
    assert loader.started == ["a"]


def test_ram_holds_what_was_used_last(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=1, max_loaded_bytes=2)
    for digest in ("a", "b", "a", "c"):
        end(tiers, run(tiers, loader, digest))
    assert loader.started == ["a", "b", "c"]
    run(tiers, loader, "a")
    assert loader.started == ["a", "b", "c"], "b has left"


def test_what_somebody_waits_for_stays_in_ram_whatever_the_budget(loader: FakeLoader) -> None:
    tiers, waiting = fake_tiers(loader, max_loaded_bytes=0), wanting("a", "b")
    tiers.acquire(waiting)
    load(tiers, loader, "a")
    load_again = tiers.collect()
    assert not load_again
    assert tiers.acquire(waiting) == "loading"
    load(tiers, loader, "b")
    assert tiers.acquire(waiting) == "ready"
    assert loader.started == ["a", "b"]
    end(tiers, waiting)
    assert tiers.num_loaded_bytes == 0


def test_an_adapter_that_goes_while_another_is_read_is_read_again(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=2, max_loaded_bytes=0)
    end(tiers, run(tiers, loader, "a"))
    waiting = wanting("a", "b")
    assert tiers.acquire(waiting) == "loading"  # for b
    end(tiers, run(tiers, loader, "c"), run(tiers, loader, "d"))
    assert "a" not in tiers.residents
    load(tiers, loader, "b")
    assert tiers.acquire(waiting) == "loading"  # for a
    load(tiers, loader, "a")
    assert tiers.acquire(waiting) == "ready"


def test_no_more_are_read_at_a_time_than_the_limit(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=100)
    waiting = [wanting(f"{number}") for number in range(MAX_LOADING + 3)]
    assert {tiers.acquire(sequence) for sequence in waiting} == {"loading"}
    assert len(loader.started) == MAX_LOADING
    load(tiers, loader, "0", "1")
    assert [tiers.acquire(sequence) for sequence in waiting[:3]] == ["ready", "ready", "loading"]
    for sequence in waiting[MAX_LOADING:]:
        tiers.acquire(sequence)
    assert len(loader.started) == MAX_LOADING + 2
    assert tiers.acquire(wanting("0")) == "ready", "what is there needs no reading"


def test_who_wants_what_is_not_read_while_as_many_are_as_may_be_is_behind(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=10, max_loading=2)
    resident = run(tiers, loader, "r")
    first, second = wanting("a"), wanting("b")
    late, both, same = wanting("c"), wanting("r", "c"), wanting("r", "b")
    assert tiers.acquire(first) == "loading"
    assert not any(tiers.is_load_deferred(of) for of in (first, late)), "there is room for one more"
    assert tiers.acquire(second) == "loading"
    assert tiers.is_load_deferred(late)
    assert tiers.is_load_deferred(both)
    assert not any(tiers.is_load_deferred(of) for of in (first, second, same))
    load(tiers, loader, "a")
    assert not tiers.is_load_deferred(first)
    assert tiers.is_load_deferred(late)
    assert tiers.acquire(first) == "ready"
    assert not tiers.is_load_deferred(late)
    end(tiers, resident, first)


def test_who_waits_longest_is_not_behind(loader: FakeLoader) -> None:
    """It may have more read than others may, and is asked about so that it does."""
    tiers = fake_tiers(loader, num_slots=10, max_loading=1)
    one = wanting("a", "b")
    assert tiers.acquire(one) == "loading"
    assert not tiers.is_load_deferred(one)


@pytest.mark.parametrize("fault", ["", "it is torn"])
def test_loads_that_nobody_waits_for_any_more_give_their_place_up(loader: FakeLoader, fault: str) -> None:
    tiers = fake_tiers(loader, num_slots=100)
    gone = [wanting(f"{number}") for number in range(MAX_LOADING)]
    for sequence in gone:
        tiers.acquire(sequence)
    for sequence in gone:
        tiers.release(sequence)
    late = wanting("late")
    assert tiers.acquire(late) == "loading"
    assert "late" not in loader.started
    for digest in [*loader.pending]:
        loader.arrive(digest, fault=fault)
    assert tiers.collect()
    assert tiers.acquire(late) == "loading"
    assert "late" in loader.started


def merging(*digests: str) -> Sequence:
    return Sequence(replace(request(adapters=digests), merge=MergeOptions("ties")))


def test_a_merge_that_no_request_wants_any_more_is_given_up_and_its_place_is_free(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, max_merging=1)
    one, other, late = merging("a", "b"), merging("a", "b"), merging("late")
    (digest, _), *_ = one.residents
    for sequence in (one, other):
        tiers.add_request(sequence.request)
    tiers.acquire(one)
    tiers.release(one)
    tiers.finish_request(one.request)
    assert loader.cancelled == [], "the other request wants it, though its turn has not come"
    tiers.finish_request(other.request)
    assert loader.cancelled == [digest]
    tiers.acquire(late)
    assert loader.started == [digest, late.merged_digest]


def test_a_merge_that_was_prefetched_for_a_request_that_ended_is_given_up(loader: FakeLoader) -> None:
    tiers, gone = fake_tiers(loader), merging("a", "b")
    tiers.prefetch(gone.request)
    tiers.add_request(gone.request)
    tiers.finish_request(gone.request)
    assert loader.cancelled == [gone.residents[0][0]]


def test_a_merge_that_was_given_up_is_built_for_who_asks_again(loader: FakeLoader) -> None:
    tiers, gone, again = fake_tiers(loader), merging("a", "b"), merging("a", "b")
    (digest, _), *_ = gone.residents
    tiers.add_request(gone.request)
    tiers.acquire(gone)
    tiers.drop(digest)
    tiers.release(gone)
    tiers.finish_request(gone.request)
    tiers.add_request(again.request)
    assert tiers.acquire(again) == "loading"
    assert loader.started == [digest, digest]
    load(tiers, loader, digest)
    assert tiers.acquire(again) == "ready"
    tiers.release(again)
    tiers.finish_request(again.request)
    assert loader.cancelled == [digest], "what was built stays"
    assert tiers.tier_usage()[digest].tier == "resident"


def settle_all(tiers: AdapterTiers, loader: FakeLoader, waiting: list[Sequence]) -> None:
    """Loads arrive and all are asked, again and again, as a scheduler does; who is ready ends at once."""
    for _ in range(20):
        for sequence in [*waiting]:
            if tiers.acquire(sequence) == "ready":
                tiers.release(sequence)
                waiting.remove(sequence)
        for digest in [*loader.pending]:
            loader.arrive(digest)
        tiers.collect()
    assert not waiting, "somebody waits for ever"


def test_one_sequence_may_want_more_adapters_than_the_limit(loader: FakeLoader) -> None:
    """It held all places with what it had, and waited for the rest for ever."""
    tiers = fake_tiers(loader, num_slots=100)
    settle_all(tiers, loader, [wanting(*(f"{number}" for number in range(2 * MAX_LOADING)))])


def test_those_who_hold_all_places_together_do_not_wait_for_each_other(loader: FakeLoader) -> None:
    """Each had some of its adapters in RAM, and no place was left to read the others."""
    tiers = fake_tiers(loader, num_slots=20, max_loaded_bytes=20)
    first, second = ([f"{letter}{number}" for number in range(4)] for letter in "ab")
    end(tiers, run(tiers, loader, *first, *second))
    between = [f"between {number}" for number in range(20)]
    for digest in between:  # in RAM, in place of those before, which are resident alone
        tiers.acquire(passing := wanting(digest))
        tiers.release(passing)
        load(tiers, loader, digest)
    one, other = wanting(*first, "one"), wanting(*second, *(f"{number}" for number in range(MAX_LOADING - 1)))
    assert [tiers.acquire(one), tiers.acquire(other)] == ["loading"] * 2
    end(tiers, run(tiers, loader, *between))
    assert not any(digest in tiers.residents for digest in (*first, *second))
    settle_all(tiers, loader, [one, other])


@pytest.mark.parametrize("is_busy", [False, True])
def test_adapters_that_never_fit_together_are_refused_with_the_reason(loader: FakeLoader, is_busy: bool) -> None:
    """Were told to wait, and all others behind them, until nothing ran any more."""
    tiers = fake_tiers(loader, num_slots=3, max_bytes=10)
    running = [run(tiers, loader, "running")] if is_busy else []
    by_bytes, by_slots = wanting("a", "b"), wanting("c", "d", "e", "f")
    for sequence, size in ((by_bytes, 6), (by_slots, 1)):
        assert tiers.acquire(sequence) == "loading"
        load(tiers, loader, *[*loader.pending], num_bytes=size)
        assert tiers.acquire(sequence) == "loading"
        failed = tiers.take_failed()
        assert [*failed] == [sequence]
        assert "do not fit together in the 3 slots and 10 bytes" in failed[sequence]
        tiers.release(sequence)
        tiers.check_integrity(running)


def test_an_adapter_larger_than_the_budget_is_refused(loader: FakeLoader) -> None:
    tiers, sequence = fake_tiers(loader, max_bytes=10), wanting("a")
    tiers.acquire(sequence)
    load(tiers, loader, "a", num_bytes=11)
    assert tiers.acquire(sequence) == "loading"
    assert [*tiers.take_failed()] == [sequence]


def test_who_was_preempted_asks_anew(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=1, max_loaded_bytes=0)
    preempted = run(tiers, loader, "a")
    tiers.release(preempted)
    assert preempted.terms is None
    end(tiers, run(tiers, loader, "b"))
    assert tiers.acquire(preempted) == "loading"
    load(tiers, loader, "a")
    assert tiers.acquire(preempted) == "ready"
    tiers.check_integrity([preempted])


def test_who_waits_for_loads_is_told_of_them(loader: FakeLoader) -> None:
    tiers, heard = fake_tiers(loader), list[str]()
    tiers.on_arrival(lambda: heard.append("news"))
    tiers.acquire(wanting("a"))
    loader.arrive("a")
    assert heard == ["news"]


def test_closing_ends_the_loader(loader: FakeLoader) -> None:
    fake_tiers(loader).close()
    assert loader.is_closed


def test_what_a_request_will_need_is_read_before_it_is_asked_for(loader: FakeLoader) -> None:
    tiers, sequence = fake_tiers(loader), wanting("a", "b")
    tiers.prefetch(sequence.request)
    tiers.prefetch(sequence.request)
    assert loader.started == ["a", "b"]
    load(tiers, loader, "a")
    assert tiers.acquire(sequence) == "loading"
    tiers.prefetch(sequence.request)
    assert loader.started == ["a", "b"], "one is in RAM, the other on its way"
    load(tiers, loader, "b")
    assert tiers.acquire(sequence) == "ready"
    tiers.prefetch(sequence.request)
    assert loader.started == ["a", "b"]
    tiers.check_integrity([sequence])


def test_nothing_is_read_ahead_while_anything_is_read(loader: FakeLoader) -> None:
    """What those who waited longer ask for would come after it."""
    tiers = fake_tiers(loader, max_loading=2)
    tiers.prefetch(wanting("a", "b", "c").request)
    tiers.prefetch(wanting("d").request)
    assert loader.started == ["a", "b"]
    load(tiers, loader, "a", "b")
    tiers.prefetch(wanting("d").request)
    assert loader.started == ["a", "b", "d"]
