"""Affinity: the replica that a request goes to."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.affinity import ANY, LoadBound, key_of, preferred, ranked

REPLICAS = [f"replica-{i}" for i in range(8)]
BOUND = LoadBound()


def test_a_key_depends_only_on_the_set_of_names() -> None:
    assert key_of(["safety", "math"]) == key_of(["math", "safety", "math"]) == "math+safety"
    assert key_of([]) == ANY


def test_the_ranking_is_stable_across_processes_and_versions() -> None:
    assert ranked("intent", ["a", "b", "c"]) == ranked("intent", ["b", "c", "a"]) == ["c", "b", "a"]
    assert ranked("math", ["c", "b", "a"]) == ["a", "b", "c"]


def test_adapters_spread_over_the_replicas() -> None:
    first = [ranked(f"adapter-{i}", REPLICAS)[0] for i in range(4000)]
    assert all(400 < first.count(replica) < 600 for replica in REPLICAS)


def test_a_removed_replica_moves_only_its_own_adapters() -> None:
    left = REPLICAS[:-1]
    for key in (f"adapter-{i}" for i in range(500)):
        before, after = ranked(key, REPLICAS), ranked(key, left)
        assert after == [replica for replica in before if replica != REPLICAS[-1]]


def test_a_few_requests_stay_with_their_adapters() -> None:
    first = ranked("math", REPLICAS)[0]
    loads = dict.fromkeys(REPLICAS, 0) | {first: BOUND.floor - 1}
    assert preferred("math", loads, BOUND)[0] == first


def test_beyond_the_bound_the_next_in_rank_takes_over() -> None:
    first, second = ranked("math", REPLICAS)[:2]
    loads = dict.fromkeys(REPLICAS, 0) | {first: BOUND.floor}
    assert preferred("math", loads, BOUND)[0] == second


def test_the_bound_grows_with_the_mean() -> None:
    assert LoadBound(share=1.5, floor=1).limit([10, 10, 10, 9]) == 15


@pytest.mark.parametrize("key", [ANY, "math"])
def test_if_all_are_beyond_the_bound_the_least_loaded_comes_first(key: str) -> None:
    loads = {replica: 100 + i for i, replica in enumerate(REPLICAS)}
    assert preferred(key, loads, LoadBound(share=0.1, floor=1))[0] == REPLICAS[0]


def test_a_request_without_adapters_goes_to_the_least_loaded_replica() -> None:
    loads = dict(zip(REPLICAS, [3, 2, 1, 4, 5, 6, 7, 7], strict=True))
    assert preferred(ANY, loads, BOUND)[0] == REPLICAS[2]


def test_without_replicas_none_is_preferred() -> None:
    assert preferred("math", {}, BOUND) == []


@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.text(max_size=5), st.floats(1, 3), st.integers(1, 50))
def test_no_replica_is_left_out_and_those_within_the_bound_come_first(
    numbers: list[int], key: str, share: float, floor: int
) -> None:
    loads = dict(zip(REPLICAS, numbers, strict=False))
    bound = LoadBound(share, floor)
    order = preferred(key, loads, bound)
    assert sorted(order) == sorted(loads)
    if key != ANY:
        is_within = [loads[replica] < bound.limit(loads.values()) for replica in order]
        assert is_within == sorted(is_within, reverse=True)
        within = list(itertools.compress(order, is_within))
        assert within == [replica for replica in ranked(key, loads) if replica in within]
