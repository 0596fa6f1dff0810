"""Evictions of the adapter cache, from slots and from RAM: unused adapters leave first, and what never fits is refused."""

import pytest

from tests.server.fake_loads import FakeLoader, end, fake_cache, load, run, wanting


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
