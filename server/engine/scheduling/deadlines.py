"""Whose time is up. It looks at no clock: the present is told to it."""

import heapq
from itertools import count

from server.engine.request import Sequence

MIN_COMPACT = 64


class Deadlines:
    """The sequences that have a deadline, the earliest first."""

    def __init__(self) -> None:
        self._sequences: set[Sequence] = set()
        # Those that ended early stay in it until they come up, or are the most of it.
        self._heap: list[tuple[float, int, Sequence]] = []
        self._serials = count()

    def add(self, sequence: Sequence) -> None:
        """Takes in a sequence, if it has a deadline."""
        if sequence.deadline is None:
            return
        if len(self._heap) > 2 * len(self._sequences) + MIN_COMPACT:
            self._heap = [entry for entry in self._heap if entry[2] in self._sequences]
            heapq.heapify(self._heap)
        self._sequences.add(sequence)
        heapq.heappush(self._heap, (sequence.deadline, next(self._serials), sequence))

    def discard(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended."""
        self._sequences.discard(sequence)

    @property
    def earliest(self) -> float | None:
        """When the next time is up, in monotonic seconds."""
        while self._heap and self._heap[0][2] not in self._sequences:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def expired(self, now: float) -> list[Sequence]:
        """Forgets and returns the sequences whose time is up."""
        found: list[Sequence] = []
        while (earliest := self.earliest) is not None and earliest <= now:
            sequence = heapq.heappop(self._heap)[2]
            self._sequences.remove(sequence)
            found.append(sequence)
        return found
