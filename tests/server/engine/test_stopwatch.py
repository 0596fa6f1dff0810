"""Stopwatch of an answer, with a clock that a test sets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.request import Timings
from server.engine.step import Stopwatch


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def timings(**at: float) -> Timings:
    """Start at 100, call `begin`, `note_token` or `stop` at the given times, and return the result of the last call.

    A digit after a name marks a second call.
    """
    clock = Clock()
    watch = Stopwatch(clock)
    for name, now in at.items():
        clock.now = now
        result = getattr(watch, name.rstrip("0123456789"))()
    assert isinstance(result, Timings)
    return result


def test_an_answer_waits_computes_its_prompt_and_decodes() -> None:
    assert timings(begin=102, note_token=105, stop=112) == Timings(queue=2, prefill=3, decode=7)


def test_the_first_step_and_the_first_token_count() -> None:
    assert timings(begin=101, begin2=103, note_token=104, begin3=106, note_token2=107, stop=110) == Timings(1, 3, 6)


def test_a_request_that_never_began_only_waited() -> None:
    result = timings(stop=104)
    assert result == Timings(queue=4)
    assert (result.first_token, result.total) == (4, 4)


def test_a_request_without_a_token_computed_its_prompt_to_the_end() -> None:
    assert timings(begin=101, stop=106) == Timings(queue=1, prefill=5)


def test_a_stopwatch_can_be_stopped_again() -> None:
    assert timings(begin=101, note_token=102, stop=103, stop2=105) == Timings(1, 1, 3)


@given(st.lists(st.tuples(st.sampled_from(["begin", "note_token"]), st.floats(0, 1e6)), max_size=12), st.floats(0, 1e6))
def test_no_part_is_negative_and_the_parts_add_up(steps: list[tuple[str, float]], last: float) -> None:
    """A step begins before it has a token. All other orders of calls are allowed."""
    clock = Clock()
    watch, end = Stopwatch(clock), 100.0
    for name, seconds in steps:
        end = clock.now = clock.now + seconds
        watch.begin()
        if name == "note_token":
            watch.note_token()
    end = clock.now = clock.now + last
    result = watch.stop()
    assert min(result.queue, result.prefill, result.decode) >= 0
    assert result.first_token <= result.total
    assert result.total == pytest.approx(end - 100.0)
