"""Ageing: which sequences have waited so long that their priority no longer keeps them waiting. It reads no clock."""

from collections import OrderedDict
from collections.abc import Collection

from server.engine.request import Sequence


class Ageing:
    """The waiting sequences, by how long they have waited. A sequence stays overdue for the rest of its life."""

    def __init__(self, max_wait_s: float) -> None:
        """Set the wait after which a sequence is overdue, in seconds; infinite: none ever is."""
        self._max_wait_s = max_wait_s
        self._new: dict[Sequence, None] = {}
        self._since: OrderedDict[Sequence, float] = OrderedDict()  # the longest wait first
        self._overdue: dict[Sequence, None] = {}

    def begin(self, sequence: Sequence) -> None:
        """Note that a sequence waits from the next `overdue` on: a new one, or one that was preempted."""
        (self._overdue if sequence.is_overdue else self._new)[sequence] = None

    def end(self, sequence: Sequence) -> None:
        """Note that a sequence runs or has ended."""
        self._new.pop(sequence, None)
        self._since.pop(sequence, None)
        self._overdue.pop(sequence, None)

    def overdue(self, now: float) -> Collection[Sequence]:
        """Return the waiting sequences that are overdue; `now` is in monotonic seconds. Takes no time for those that are not."""
        for sequence in self._new:
            self._since[sequence] = now
        self._new.clear()
        while self._since:
            sequence, since = next(iter(self._since.items()))
            if now - since < self._max_wait_s:
                break
            del self._since[sequence]
            sequence.is_overdue = True
            self._overdue[sequence] = None
        return self._overdue.keys()
