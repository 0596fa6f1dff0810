"""Adapter cache, from disk to RAM to a slot: each adapter is read once, and its faults reach those that wait for it."""

from dataclasses import replace

from lori.merge_options import MergeOptions
from server.engine.request import AdapterTerm, Sequence
from tests.server.fake_loads import SCALE, FakeLoader, end, fake_cache, load, wanting
from tests.server.plans import request


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


def test_the_callback_on_arrival_is_called_for_a_load(loader: FakeLoader) -> None:
    cache, events = fake_cache(loader), list[str]()
    cache.on_arrival(lambda: events.append("news"))
    cache.acquire(wanting("a"))
    loader.arrive("a")
    assert events == ["news"]


def test_closing_ends_the_loader(loader: FakeLoader) -> None:
    fake_cache(loader).close()
    assert loader.is_closed
