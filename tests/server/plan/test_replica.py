"""A simulated replica, followed by hand."""

import math

import pytest

from server.plan.replica import Replica, ReplicaSizes, SimulatedRequest
from server.plan.speed import Speed

SPEED = Speed(single=10, together=20, users=4)
"""A token takes 0.1 s alone, 0.2 s among four."""


def replica(max_batch: int = 4, num_resident: int = 8, load_s: float = 1.0) -> Replica:
    return Replica(ReplicaSizes(SPEED, max_batch, num_resident, load_s))


def run(simulated: Replica, *asked: SimulatedRequest) -> None:
    """Let the requests `asked` arrive at their times, and step until all have ended."""
    for one in asked:
        while simulated.next_at < one.arrived:
            simulated.step()
        simulated.arrive(one, one.arrived)
    while math.isfinite(simulated.next_at):
        simulated.step()


def test_one_request_waits_for_its_adapter_and_its_tokens() -> None:
    one = SimulatedRequest("a", 5, 2.0)
    run(replica(), one)
    assert (one.is_hit, one.started, one.ended) == (False, 3.0, pytest.approx(3.5))


def test_an_adapter_is_resident_for_a_later_request() -> None:
    simulated, first, second = replica(), SimulatedRequest("a", 5, 0.0), SimulatedRequest("a", 5, 9.0)
    run(simulated, first, second)
    assert (second.is_hit, second.ended, simulated.num_loads) == (True, pytest.approx(9.5), 1)


def test_a_request_during_a_read_of_its_adapter_waits_for_that_read() -> None:
    simulated, first, second = replica(), SimulatedRequest("a", 5, 0.0), SimulatedRequest("a", 5, 0.5)
    run(simulated, first, second)
    assert (second.is_hit, simulated.num_loads, second.started) == (False, 1, 1.0)


def test_adapters_are_read_one_after_the_other_while_the_batch_goes_on() -> None:
    asked = [SimulatedRequest(name, 1, 0.0) for name in "abc"]
    run(replica(), *asked)
    assert [one.started for one in asked] == [1.0, 2.0, 3.0]


def test_requests_that_run_together_slow_each_other() -> None:
    asked = [SimulatedRequest("a", 6, 0.0) for _ in range(4)]
    run(replica(), *asked)
    assert [one.ended for one in asked] == [pytest.approx(1 + 6 * 0.2)] * 4


def test_a_request_that_ends_makes_the_others_faster() -> None:
    short, long = SimulatedRequest("a", 3, 0.0), SimulatedRequest("a", 6, 0.0)
    run(replica(), short, long)
    both = SPEED.seconds_per_token(2)
    assert short.ended == pytest.approx(1 + 3 * both)
    assert long.ended == pytest.approx(1 + 3 * both + 3 * 0.1)


def test_a_request_waits_while_the_batch_is_full() -> None:
    asked = [SimulatedRequest("a", 10, 0.0) for _ in range(3)]
    run(replica(max_batch=2), *asked)
    assert asked[2].started == pytest.approx(asked[0].ended)


def test_the_adapter_unused_longest_makes_room_and_is_read_again() -> None:
    simulated = replica(max_batch=1, num_resident=2)
    asked = [SimulatedRequest(name, 1, 10.0 * i) for i, name in enumerate("abacaba")]
    run(simulated, *asked)
    assert [one.is_hit for one in asked] == [False, False, True, False, True, False, True]
    assert simulated.num_loads == 4


def test_an_adapter_evicted_while_its_request_waited_is_read_again() -> None:
    simulated = replica(max_batch=1, num_resident=1, load_s=0.01)
    asked = [
        SimulatedRequest("a", 1, 0.0),
        SimulatedRequest("b", 10, 1.0),
        SimulatedRequest("c", 10, 1.001),
        SimulatedRequest("b", 1, 1.5),
    ]
    run(simulated, *asked)
    assert asked[3].is_hit
    assert simulated.num_loads == 4
    assert all(math.isfinite(one.ended) for one in asked)
