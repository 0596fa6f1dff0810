"""Residents: the slot of each adapter, the adapters that must stay, and the order of eviction."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.adapters.residents import Residents


def filled(num_slots: int, *digests: str, max_bytes: int = 100) -> Residents:
    """Return residents of one byte each, the first one the least recently used."""
    residents = Residents(num_slots, max_bytes)
    for digest in digests:
        residents.add(digest, 1, 1.0)
    return residents


def test_every_adapter_has_a_slot_of_its_own_and_its_scale() -> None:
    residents = Residents(3, 100)
    slots = [residents.add(digest, 10, scale) for digest, scale in (("a", 0.5), ("b", 2.0), ("c", 1.0))]
    assert sorted(slots) == [0, 1, 2]
    assert [residents.get(digest).slot for digest in "abc"] == slots
    assert [residents.get(digest).scale for digest in "abc"] == [0.5, 2.0, 1.0]
    assert (len(residents), residents.num_bytes) == (3, 30)
    assert "a" in residents
    assert "d" not in residents
    residents.check_integrity(0)


def test_there_is_room_while_slots_and_bytes_last() -> None:
    residents = filled(2, "a", max_bytes=10)
    assert residents.make_room(9) == []
    assert residents.num_evictions == 0


def test_the_least_recently_used_adapter_is_evicted() -> None:
    residents = filled(3, "a", "b", "c")
    slot = residents.get("b").slot
    residents.acquire("a")
    residents.release("a")  # a is now the most recently used
    assert residents.make_room(1) == [slot]
    assert residents.add("d", 1, 1.0) == slot
    assert [digest in residents for digest in "abcd"] == [True, False, True, True]
    assert residents.num_evictions == 1
    residents.check_integrity(0)


def test_the_last_use_of_an_adapter_is_its_release() -> None:
    residents = filled(2, "a", "b")
    residents.acquire("a")
    residents.acquire("b")
    residents.release("b")
    residents.release("a")
    assert len(residents.make_room(1) or ()) == 1
    assert "a" in residents
    assert "b" not in residents


def test_an_adapter_in_use_is_not_evicted() -> None:
    residents = filled(2, "a", "b")
    for digest in ("a", "b", "b"):
        residents.acquire(digest)
    assert residents.num_in_use == 2
    assert residents.make_room(1) is None
    residents.release("b")
    assert residents.make_room(1) is None, "another sequence still uses b"
    residents.release("b")
    assert residents.num_in_use == 1
    assert len(residents.make_room(1) or ()) == 1
    assert "a" in residents
    residents.check_integrity(1)


def test_as_many_adapters_are_evicted_as_the_bytes_need_and_no_more() -> None:
    residents = Residents(8, 10)
    for digest in "abc":
        residents.add(digest, 3, 1.0)
    residents.acquire("a")
    assert len(residents.make_room(4) or ()) == 1
    assert [digest in residents for digest in "abc"] == [True, False, True]
    assert residents.num_bytes == 6


def test_nothing_is_evicted_for_an_adapter_that_cannot_fit() -> None:
    residents = Residents(8, 10)
    for digest in "abc":
        residents.add(digest, 3, 1.0)
    residents.acquire("c")
    assert residents.make_room(8) is None
    assert residents.make_room(11) is None
    assert len(residents) == 3
    assert residents.num_evictions == 0


def test_an_adapter_as_large_as_the_budget_fits_alone() -> None:
    residents = filled(8, "a", "b", max_bytes=10)
    assert len(residents.make_room(10) or ()) == 2
    residents.add("c", 10, 1.0)
    residents.check_integrity(0)


def test_a_release_without_an_acquire_is_noticed() -> None:
    residents = filled(1, "a")
    with pytest.raises(AssertionError):
        residents.release("a")


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40))
def test_any_order_of_use_keeps_the_counts_right(uses: list[tuple[str, bool]]) -> None:
    residents, sizes, held = Residents(3, 12), dict(zip("abcdef", range(1, 7), strict=True)), list[str]()
    for digest, is_held in uses:
        if digest not in residents:
            before = set(held)
            if residents.make_room(sizes[digest]) is None:
                assert residents.num_bytes + sizes[digest] > 12 or len(residents) == 3
                assert held
                residents.release(held.pop())
                continue
            assert all(other in residents for other in before)
            residents.add(digest, sizes[digest], 1.0)
        residents.acquire(digest)
        if is_held:
            held.append(digest)
        else:
            residents.release(digest)
        residents.check_integrity(len(held))
        assert residents.num_in_use == len(set(held))


def test_a_pinned_adapter_is_not_evicted_until_it_is_unpinned() -> None:
    residents = filled(2, "a", "b")
    residents.pin("a")
    residents.pin("a")
    slot = residents.get("b").slot
    assert residents.make_room(1) == [slot]
    assert residents.make_room(100) is None
    residents.check_integrity(0)
    residents.unpin("a")
    residents.unpin("a")
    residents.unpin("nobody")
    assert (residents.num_pinned, residents.num_pinned_bytes) == (0, 0)
    assert residents.make_room(100) is not None
    residents.check_integrity(0)


def test_sizes_are_those_of_the_residents() -> None:
    residents = Residents(3, 100)
    residents.add("a", 10, 1.0)
    residents.add("b", 20, 1.0)
    assert residents.sizes() == {"a": 10, "b": 20}
    residents.remove("a")
    assert residents.sizes() == {"b": 20}
