"""Where the time of one sequence's answer goes."""

from collections.abc import Callable

from server.engine.request import Timings


class Stopwatch:
    """Runs from when a sequence is submitted; hears when it first runs, and when it has tokens."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._submitted = clock, clock()
        self._begun: float | None = None
        self._first: float | None = None

    def begin(self) -> None:
        """Notes that the sequence is in a step; the first counts."""
        if self._begun is None:
            self._begun = self._clock()

    def note_token(self) -> None:
        """Notes that the sequence has a token; the first counts."""
        if self._first is None:
            self._first = self._clock()

    def stop(self) -> Timings:
        """Returns where the time went until now."""
        now = self._clock()
        begun = now if self._begun is None else self._begun
        first = now if self._first is None else self._first
        return Timings(queue=begun - self._submitted, prefill=first - begun, decode=now - first)
