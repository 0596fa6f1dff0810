"""What is taken in, kept and dropped by hand while sequences come and go."""

from dataclasses import replace

import pytest

from lori.merge import MergeOptions
from server.engine.adapters.cache import AdapterTiers
from server.engine.adapters.residents import NoRoomError, TierUsage
from server.engine.request import Sequence
from tests.server.fake_loads import FakeLoader, FakePool, fake_packed, fake_tiers
from tests.server.plans import request


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


def wanting(*digests: str) -> Sequence:
    return Sequence(request(adapters=digests))


def run(tiers: AdapterTiers, loader: FakeLoader, *digests: str) -> Sequence:
    """Returns a sequence whose adapters are pinned."""
    sequence = wanting(*digests)
    if tiers.acquire(sequence) == "loading":
        for digest in [*loader.pending]:
            loader.arrive(digest)
        tiers.collect()
        assert tiers.acquire(sequence) == "ready"
    return sequence


def is_empty(tiers: AdapterTiers) -> bool:
    tiers.check_integrity([])
    assert isinstance(tiers._pool, FakePool)
    return (
        not tiers.tier_usage()
        and not tiers.num_loaded_bytes
        and not tiers._pool.slots
        and not tiers._dropped
        and not tiers._merge_parts
    )


def test_what_is_taken_in_is_resident_and_never_read(loader: FakeLoader) -> None:
    tiers, sequence = fake_tiers(loader), wanting("a")
    assert tiers.insert("a", fake_packed("a", 7))
    assert tiers.tier_usage() == {"a": TierUsage(7, 7)}
    assert tiers.tier_usage()["a"].tier == "resident"
    assert tiers.insert("a", fake_packed("a", 7)), "again"
    assert tiers.acquire(sequence) == "ready"
    assert not loader.started
    tiers.check_integrity([sequence])


def test_what_is_taken_in_while_all_slots_are_used_waits_in_ram(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=1)
    running = run(tiers, loader, "a")
    assert not tiers.insert("b", fake_packed("b"))
    assert tiers.tier_usage()["b"].tier == "loaded"
    tiers.release(running)
    assert tiers.acquire(wanting("b")) == "ready"


def test_what_is_taken_in_is_there_for_who_waits_for_it(loader: FakeLoader) -> None:
    tiers, sequence = fake_tiers(loader), wanting("a")
    assert tiers.acquire(sequence) == "loading"
    tiers.insert("a", fake_packed("a"))
    assert tiers.acquire(sequence) == "ready"
    loader.arrive("a")
    tiers.collect()
    tiers.check_integrity([sequence])


def test_places_say_the_tier_of_each(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=1, max_loaded_bytes=1)
    tiers.release(run(tiers, loader, "a"))
    assert tiers.tier_usage() == {"a": TierUsage(1, 1)}
    tiers.acquire(wanting("b"))
    loader.arrive("b")
    tiers.collect()
    assert tiers.tier_usage() == {"a": TierUsage(0, 1), "b": TierUsage(1, 0)}
    assert [place.tier for place in (TierUsage(), TierUsage(1, 0), TierUsage(0, 1))] == ["disk", "loaded", "resident"]


def test_what_is_kept_never_makes_room(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=2)
    assert tiers.pin("a", fake_packed("a"))
    for digest in "bcd":
        tiers.release(run(tiers, loader, digest))
        assert tiers.tier_usage()["a"].tier == "resident"
    tiers.residents.unpin("a")
    tiers.release(run(tiers, loader, "e", "f"))
    assert tiers.tier_usage()["a"].tier == "loaded"
    tiers.residents.unpin("a")
    tiers.check_integrity([])


def test_half_of_slots_and_bytes_is_left_for_others(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=4, max_bytes=20)
    assert tiers.pin("a", fake_packed("a", 6))
    with pytest.raises(
        NoRoomError, match="pinned are 1 adapters of 6 bytes, and this one has 5, expected half at most of 4 slots"
    ):
        tiers.pin("b", fake_packed("b", 5))
    assert tiers.pin("a", fake_packed("a", 6)), "what is kept already is no more"
    assert tiers.pin("c", fake_packed("c", 4))
    with pytest.raises(NoRoomError):
        tiers.pin("d", fake_packed("d", 0))
    assert (tiers.residents.num_pinned, tiers.residents.num_pinned_bytes) == (2, 10)
    tiers.check_integrity([])


def test_one_slot_is_nobodys(loader: FakeLoader) -> None:
    with pytest.raises(NoRoomError):
        fake_tiers(loader, num_slots=1).pin("a", fake_packed("a"))


def test_what_cannot_be_kept_now_is_not_kept(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=2)
    running = run(tiers, loader, "a", "b")
    assert not tiers.pin("c", fake_packed("c"))
    assert tiers.residents.num_pinned == 0
    tiers.release(running)
    assert tiers.pin("c", fake_packed("c"))


def test_adapters_that_never_fit_beside_what_is_kept_are_refused(loader: FakeLoader) -> None:
    """They would wait for room that nobody ever gives up, and all others behind them."""
    tiers = fake_tiers(loader, num_slots=4)
    tiers.pin("a", fake_packed("a"))
    for digests, is_refused in ((("b", "c", "d", "e"), True), (("a", "b", "c", "d"), False)):
        for digest in digests:
            tiers.insert(digest, fake_packed(digest))
        sequence = wanting(*digests)
        assert tiers.acquire(sequence) == ("loading" if is_refused else "ready")
        failed = tiers.take_failed()
        assert [*failed] == ([sequence] if is_refused else [])
        if is_refused:
            assert "do not fit together in the 3 slots" in failed[sequence]
        tiers.release(sequence)


def test_what_is_dropped_and_unused_is_free_at_once(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader)
    tiers.release(run(tiers, loader, "a"))
    tiers.drop("a")
    assert is_empty(tiers)
    assert tiers.acquire(wanting("a")) == "loading"
    assert loader.started == ["a", "a"], "who asks again has it read again"


def test_what_is_dropped_in_use_is_free_when_the_last_has_ended(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader)
    one, other = run(tiers, loader, "a"), run(tiers, loader, "a")
    tiers.drop("a")
    tiers.release(one)
    assert tiers.tier_usage()["a"].tier == "resident"
    tiers.check_integrity([other])
    tiers.release(other)
    assert is_empty(tiers)


def test_what_is_dropped_while_somebody_waits_for_it_goes_with_him(loader: FakeLoader) -> None:
    tiers, waiting = fake_tiers(loader), wanting("a", "b")
    tiers.acquire(waiting)
    loader.arrive("a")
    tiers.collect()
    tiers.drop("a")
    assert tiers.tier_usage()["a"].tier == "loaded"
    tiers.release(waiting)
    assert "a" not in tiers.tier_usage()
    loader.arrive("b")
    tiers.collect()
    tiers.drop("b")
    assert is_empty(tiers)


def test_what_is_dropped_while_it_is_read_for_nobody_does_not_stay(loader: FakeLoader) -> None:
    tiers, gone = fake_tiers(loader), wanting("a")
    tiers.acquire(gone)
    tiers.release(gone)
    tiers.drop("a")
    loader.arrive("a")
    tiers.collect()
    assert is_empty(tiers)


def test_what_was_read_in_vain_and_dropped_is_forgotten(loader: FakeLoader) -> None:
    tiers, gone = fake_tiers(loader), wanting("a")
    tiers.acquire(gone)
    tiers.release(gone)
    tiers.drop("a")
    loader.arrive("a", fault="torn")
    tiers.collect()
    assert is_empty(tiers)


def test_what_comes_back_before_it_is_free_stays(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader)
    running = run(tiers, loader, "a")
    tiers.drop("a")
    tiers.insert("a", fake_packed("a"))
    tiers.release(running)
    assert tiers.tier_usage()["a"].tier == "resident"
    tiers.drop("a")
    assert is_empty(tiers)


def test_what_was_kept_can_be_dropped(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader)
    tiers.pin("a", fake_packed("a"))
    tiers.drop("a")
    assert tiers.residents.num_pinned == 0
    assert is_empty(tiers)


def test_what_was_merged_of_it_is_dropped_too(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=4)
    sequences = [
        Sequence(replace(request(adapters=pair), merge=MergeOptions("ties"))) for pair in (("a", "b"), ("b", "c"), ("c", "d"))
    ]
    for sequence in sequences:
        tiers.acquire(sequence)
        for digest in [*loader.pending]:
            loader.arrive(digest)
        tiers.collect()
        assert tiers.acquire(sequence) == "ready"
    tiers.drop("b")
    assert len(tiers.tier_usage()) == 3, "all are in use"
    for sequence in sequences:
        tiers.release(sequence)
    assert [*tiers.tier_usage()] == [sequences[2].residents[0][0]]
    tiers.drop("d")
    assert is_empty(tiers)


def test_merges_that_made_room_are_forgotten(loader: FakeLoader) -> None:
    tiers = fake_tiers(loader, num_slots=1, max_loaded_bytes=0)
    for number in range(20):
        sequence = Sequence(replace(request(adapters=("a", f"{number}")), merge=MergeOptions("ties")))
        tiers.acquire(sequence)
        loader.arrive(*loader.pending)
        tiers.collect()
        assert tiers.acquire(sequence) == "ready"
        tiers.release(sequence)
        tiers.collect()
    assert len(tiers._merge_parts) <= 3
