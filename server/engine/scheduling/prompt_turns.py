"""Which prompt is first to what a step has room for, of those that are computed at the same time."""

from collections.abc import Iterable

from server.engine.request import Sequence


class PromptTurns:
    """By priority, then in the order in which they joined; but in every other step the one with the least left is first.

    So a short prompt waits only a few steps behind a long one, which has every other step to itself whatever comes after it.
    """

    def __init__(self) -> None:
        self._is_of_least = False

    def order(self, prompts: Iterable[Sequence]) -> list[Sequence]:
        """Returns `prompts`, which are in the order in which they joined, in that of their turns in the next step."""
        ordered = sorted(prompts, key=_priority)
        if len(ordered) > 1:
            if self._is_of_least:
                least = min(ordered, key=lambda sequence: (_priority(sequence), sequence.num_tokens - sequence.num_computed))
                ordered.remove(least)
                ordered.insert(0, least)
            self._is_of_least = not self._is_of_least
        return ordered


def _priority(sequence: Sequence) -> int:
    return sequence.request.priority
