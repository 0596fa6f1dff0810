"""Simulated replicas: invariants for all numbers, and the gain by affinity."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

from server.plan.plots import plot_outcomes
from server.plan.replica import ReplicaSizes
from server.plan.simulation import POLICIES, Outcome, Policy, Traffic, draw_traffic, simulate
from server.plan.speed import Speed

NUM_ADAPTERS, NUM_REQUESTS, NUM_REPLICAS = 2000, 4000, 4


def traffic(seed: int = 0, num_adapters: int = NUM_ADAPTERS, zipf: float = 1.0) -> Traffic:
    return draw_traffic(num_adapters=num_adapters, num_requests=NUM_REQUESTS, rps=20, zipf=zipf, mean_tokens=64, seed=seed)


def outcome(policy: Policy, num_resident: int = 100, **drawn: int) -> Outcome:
    sizes = ReplicaSizes(Speed(100, 500, 32), max_batch=64, num_resident=num_resident, load_s=0.02)
    return simulate(traffic(**drawn), policy, NUM_REPLICAS, sizes, seed=1)


once = cache(outcome)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_and_reported_once(policy: Policy) -> None:
    calls: list[bool] = []
    sizes = ReplicaSizes(Speed(100, 500, 32), max_batch=64, num_resident=100, load_s=0.02)
    result = simulate(traffic(), policy, NUM_REPLICAS, sizes, 1, lambda: calls.append(True))
    assert result.num_requests == NUM_REQUESTS == len(calls)
    assert result == once(policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_another_seed_is_another_run(policy: Policy) -> None:
    assert once(policy) != outcome(policy, seed=2)


def test_affinity_finds_more_adapters_resident_than_chance() -> None:
    affinity, chance = once("affinity"), once("random")
    assert affinity.hit_rate > chance.hit_rate + 0.05
    assert affinity.loads_per_s < chance.loads_per_s
    assert affinity.first_share > 0.7
    assert chance.first_share == pytest.approx(1 / NUM_REPLICAS, abs=0.03)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replica_reads_no_adapter_twice_if_all_fit(policy: Policy) -> None:
    result = outcome(policy, num_resident=NUM_ADAPTERS)
    distinct = len(Counter(traffic().adapters.tolist()))
    assert distinct <= result.num_loads <= NUM_REPLICAS * distinct
    assert result.num_loads < once(policy).num_loads


def test_with_one_replica_all_policies_agree() -> None:
    sizes = ReplicaSizes(Speed(100, 1500, 32), max_batch=64, num_resident=100, load_s=0.02)
    first, *others = (simulate(traffic(), policy, 1, sizes, 0) for policy in POLICIES)
    assert (first.imbalance, first.first_share) == (1.0, 1.0)
    assert all((other.hit_rate, other.p99_s) == (first.hit_rate, first.p99_s) for other in others)


def test_chance_hits_as_often_as_theory_says() -> None:
    """Compare with Che, Tung and Wang 2002: an LRU cache holds the adapters requested in a window in which as many are as fit."""
    shares = 1 / np.arange(1, NUM_ADAPTERS + 1)
    shares /= shares.sum()
    low, high = 1.0, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if (1 - np.exp(-shares * middle)).sum() < 100 else (low, middle)
    expected = float((shares * (1 - np.exp(-shares * low))).sum())
    assert once("random").hit_rate == pytest.approx(expected, abs=0.02)


def test_the_least_loaded_is_balanced_best() -> None:
    assert once("least loaded").imbalance < once("affinity").imbalance
    assert once("least loaded").p99_s < once("random").p99_s


def test_traffic_has_the_requested_rates() -> None:
    drawn = traffic()
    assert (drawn.arrivals[1:] > drawn.arrivals[:-1]).all()
    assert NUM_REQUESTS / drawn.arrivals[-1] == pytest.approx(20, rel=0.1)
    assert drawn.num_tokens.mean() == pytest.approx(64, rel=0.1)
    assert drawn.num_tokens.min() >= 1
    counts = Counter(drawn.adapters.tolist())
    # The k-th adapter has 1/k of the first one's share.
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.25)
    assert max(counts) < NUM_ADAPTERS


def test_without_zipf_all_adapters_are_as_popular() -> None:
    counts = Counter(traffic(num_adapters=4, zipf=0.0).adapters.tolist())
    assert all(counts[adapter] == pytest.approx(NUM_REQUESTS / 4, rel=0.1) for adapter in range(4))


def test_a_single_adapter_stays_on_its_first_replica_while_that_has_little_to_do() -> None:
    sizes = ReplicaSizes(Speed(1000, 50_000, 32), max_batch=64, num_resident=100, load_s=0.001)
    result = simulate(traffic(num_adapters=1), "affinity", NUM_REPLICAS, sizes, 0)
    assert (result.first_share, result.imbalance, result.num_loads) == (1.0, NUM_REPLICAS, 1)


def test_an_adapter_that_is_too_popular_for_its_replica_is_answered_by_the_others_too() -> None:
    bounded, balanced = (outcome(policy, num_adapters=1) for policy in ("affinity", "least loaded"))
    assert bounded.first_share > 1.2 / NUM_REPLICAS
    assert bounded.p99_s < 2 * balanced.p99_s


def test_the_picture_has_a_line_for_each_policy() -> None:
    figure = plot_outcomes([once(policy) for policy in POLICIES])
    assert figure.axes[0].get_title() == "resident adapters hit (%)"
    assert all([line.get_label() for line in axes.lines] == list(POLICIES) for axes in figure.axes)
