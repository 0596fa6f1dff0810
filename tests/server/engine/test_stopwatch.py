"""Where the time of an answer goes, by a clock that a test sets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.request import Timings
from server.engine.step import Stopwatch


class Clock:
    """Says what it is set to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def timings(**at: float) -> Timings:
    """Begins at 100, then does `begin`, `note_token` or `stop` at the times that are said, with a digit for a second time."""
    clock = Clock()
    watch = Stopwatch(clock)
    for name, now in at.items():
        clock.now = now
        found = getattr(watch, name.rstrip("0123456789"))()
    assert isinstance(found, Timings)
    return found


def test_an_answer_waits_computes_its_prompt_and_decodes() -> None:
    assert timings(begin=102, note_token=105, stop=112) == Timings(queue=2, prefill=3, decode=7)


def test_the_first_step_and_the_first_token_count() -> None:
    assert timings(begin=101, begin2=103, note_token=104, begin3=106, note_token2=107, stop=110) == Timings(1, 3, 6)


def test_what_never_began_only_waited() -> None:
    found = timings(stop=104)
    assert found == Timings(queue=4)
    assert (found.first_token, found.total) == (4, 4)


def test_what_has_no_token_computed_its_prompt_to_the_end() -> None:
    assert timings(begin=101, stop=106) == Timings(queue=1, prefill=5)


def test_it_can_be_stopped_again() -> None:
    assert timings(begin=101, note_token=102, stop=103, stop2=105) == Timings(1, 1, 3)


@given(st.lists(st.tuples(st.sampled_from(["begin", "note_token"]), st.floats(0, 1e6)), max_size=12), st.floats(0, 1e6))
def test_no_part_is_negative_and_they_add_up(steps: list[tuple[str, float]], last: float) -> None:
    """A step begins before it has a token: whatever else happens, in whatever order."""
    clock = Clock()
    watch, end = Stopwatch(clock), 100.0
    for name, seconds in steps:
        end = clock.now = clock.now + seconds
        watch.begin()
        if name == "note_token":
            watch.note_token()
    end = clock.now = clock.now + last
    found = watch.stop()
    assert min(found.queue, found.prefill, found.decode) >= 0
    assert found.first_token <= found.total
    assert found.total == pytest.approx(end - 100.0)
