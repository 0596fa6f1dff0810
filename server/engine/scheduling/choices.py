"""The choices of one request: the first computes the prompt, the others wait and then share its blocks."""

from server.engine.request import Sequence


class Choices:
    """The requests of several choices whose prompt is not computed yet."""

    def __init__(self) -> None:
        # By identity: all choices have one request object, and comparing two would compare their prompts. The first leads.
        self._groups: dict[int, list[Sequence]] = {}

    def join(self, sequence: Sequence) -> bool:
        """Takes in a new sequence; returns whether it has to wait for another one to compute its prompt."""
        if sequence.request.num_choices == 1:
            return False
        group = self._groups.setdefault(id(sequence.request), [])
        group.append(sequence)
        return len(group) > 1

    def is_following(self, sequence: Sequence) -> bool:
        """Whether another one computes the prompt of this sequence."""
        group = self._groups.get(id(sequence.request))
        return group is not None and sequence in group[1:]

    def disband(self, sequence: Sequence) -> list[Sequence]:
        """Returns those that waited for this sequence, which has computed the prompt."""
        return self._groups.pop(id(sequence.request), [])[1:]

    def leave(self, sequence: Sequence) -> Sequence | None:
        """Takes out a sequence that ends; if others waited for it, returns the one that computes the prompt instead."""
        group = self._groups.get(id(sequence.request), [])
        if sequence not in group:
            return None
        has_led = group[0] is sequence
        group.remove(sequence)
        if not group:
            del self._groups[id(sequence.request)]
        return group[0] if group and has_led else None
