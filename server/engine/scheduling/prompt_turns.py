"""Which prompt is first to what a step has room for, of those that are computed at the same time."""

from collections.abc import Iterable

from server.engine.request import Sequence


class PromptTurns:
    """By priority, then in the order in which they joined; but every other step begins with one that has much less left.

    So a short prompt waits a step at most for each of its own behind a long one, and the long one begins every other step
    whatever comes after it.
    """

    def __init__(self) -> None:
        self._is_least_first = True

    def next_order(self, prompts: Iterable[Sequence]) -> list[Sequence]:
        """Returns `prompts`, which are in the order in which they joined, in that of their turns in the next step."""
        ordered = sorted(prompts, key=_priority)
        if len(ordered) < 2:
            self._is_least_first = True
            return ordered
        if self._is_least_first:
            least = min(ordered, key=lambda sequence: (_priority(sequence), _num_left(sequence)))
            if 2 * _num_left(least) <= _num_left(ordered[0]):
                ordered.remove(least)
                ordered.insert(0, least)
        self._is_least_first = not self._is_least_first
        return ordered


def _priority(sequence: Sequence) -> int:
    return sequence.priority


def _num_left(sequence: Sequence) -> int:
    return sequence.num_tokens - sequence.num_computed
