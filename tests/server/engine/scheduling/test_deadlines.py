"""Deadlines of sequences, in order of time."""

from server.engine.request import Sequence
from server.engine.scheduling.scheduler import MIN_COMPACT, Deadlines
from tests.server.plans import request


def added(to: Deadlines, deadline: float | None) -> Sequence:
    sequence = Sequence(request(), deadline=deadline)
    to.add(sequence)
    return sequence


def test_sequences_expire_at_their_deadlines_the_earliest_first() -> None:
    deadlines = Deadlines()
    late, early, never, middle = (added(deadlines, at) for at in (3.0, 1.0, None, 2.0))
    assert deadlines.earliest == 1.0
    assert deadlines.pop_expired(0.5) == []
    assert deadlines.pop_expired(2.0) == [early, middle]
    assert deadlines.pop_expired(2.0) == []
    assert deadlines.earliest == 3.0
    assert deadlines.pop_expired(9.0) == [late]
    assert deadlines.earliest is None
    assert never.deadline is None


def test_a_sequence_that_has_ended_does_not_expire() -> None:
    deadlines = Deadlines()
    first, second = added(deadlines, 1.0), added(deadlines, 2.0)
    deadlines.discard(first)
    assert deadlines.earliest == 2.0
    assert deadlines.pop_expired(9.0) == [second]


def test_sequences_that_ended_long_before_their_deadlines_do_not_pile_up() -> None:
    deadlines = Deadlines()
    remaining = added(deadlines, 500.0)
    for _ in range(1000):
        deadlines.discard(added(deadlines, 1000.0))
    assert len(deadlines._heap) <= MIN_COMPACT + 3
    assert deadlines.pop_expired(2000.0) == [remaining]
