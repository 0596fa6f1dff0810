"""The budget of a step: its cost in seconds, and the prompts' chunks that fit. No tensor, no clock.

The constants are measured when the server starts (`server.engine.startup`). A decoding step costs what its sequences and their
keys cost. A prompt's chunk adds its tokens, and the reading of all keys before them: once a chunk whatever its length, and
attention for each of its tokens.
"""

from bisect import bisect, bisect_right
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from server.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by a count: linear between the points that were measured, and on as between the last two."""

    counts: tuple[int, ...]
    """Ascending."""
    seconds: tuple[float, ...]
    """Never descending."""

    def __post_init__(self) -> None:
        assert len(self.counts) == len(self.seconds) >= 1
        assert all(before < after for before, after in pairwise(self.counts))
        assert all(before <= after for before, after in pairwise(self.seconds))

    def __call__(self, count: int) -> float:
        """Return what `count` cost; no less than the first point."""
        if len(self.counts) == 1:
            return self.seconds[0]
        place = min(max(1, bisect(self.counts, count)), len(self.counts) - 1)
        (left, right), (low, high) = self.counts[place - 1 : place + 1], self.seconds[place - 1 : place + 1]
        return max(self.seconds[0], low + (high - low) * (count - left) / (right - left))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """A step's seconds."""

    prompt: Curve
    """Of a step by its tokens, which see few keys."""
    decoding: Curve
    """Of a step by the sequences that decode, which see few keys: a step without prompts."""
    per_key: float
    """Of reading a key for a chunk, or a token that decodes."""
    per_pair: float
    """Of a token that attends to a key."""

    def usual(self, positions: Items[int]) -> float:
        """Return the seconds of a step of one token of a sequence at each of `positions`."""
        return self.decoding(len(positions)) + (self.per_key + self.per_pair) * sum(positions)

    def added(self, num_tokens: int, start: int, count: int) -> float:
        """Return the seconds that the tokens `start` to `start + count` of a prompt add to a step of `num_tokens`."""
        in_products = self.prompt(num_tokens + count) - (self.prompt(num_tokens) if num_tokens else 0.0)
        return in_products + (self.per_key + self.per_pair * count) * (start + count / 2)


LEAST = 4
"""Tokens of a prompt for which it is worth reading all the keys before them: where there is no time for so many, none run."""
MULTIPLE = 2
"""Of a step's tokens: an odd one costs as much as two."""
MAX_SHORT_STEPS = 4
"""A prompt that costs, in one step, more than so many short steps is long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """How much a step may take on."""

    max_sequences: int
    max_tokens: int
    max_stall: float
    """How many times as long as decoding alone a step may take that computes prompts beside it; infinite: no limit."""
    short_step_s: float
    """Seconds that a step may take for short prompts, where that limit is less."""
    cost: StepCost

    def __post_init__(self) -> None:
        assert self.max_tokens > self.max_sequences, "a step must have room for prompts beside decoding"
        assert self.max_stall >= 1


class Room:
    """What a step has room for beside the sequences that decode at `positions`. Where none does there is nobody to be stalled."""

    def __init__(self, limits: StepLimits, positions: Items[int]) -> None:
        self._limits, self._num_tokens = limits, len(positions)
        self._seconds, self._has_prompt = 0.0, False
        self._for_long = self._for_short = inf
        if positions:
            usual = limits.cost.usual(positions)
            self._for_long = (limits.max_stall - 1) * usual
            self._for_short = max(limits.short_step_s - usual, self._for_long)

    def take(self, start: int, stop: int, *, first: int, may_exceed: bool = True) -> int:
        """Take room for the tokens `start` to `stop` of a prompt, and return for how many from `start` on there was.

        `first`: where its computing began. Whether it is short is seen by all from there on, not by what is left: else the end of
        a long one would stall others more than what came before. `may_exceed`: a short one may use what only short ones may. The
        first prompt always gets some room, so that it comes to its end.
        """
        most = min(stop - start, self._limits.max_tokens - self._num_tokens)
        if most <= 0 or (self._has_prompt and self._seconds >= self._for_short):
            return 0
        is_short = may_exceed and self._is_short(first, stop)
        seconds = (self._for_short if is_short else self._for_long) - self._seconds
        least = min(most, LEAST + (self._num_tokens + LEAST) % MULTIPLE)
        if self._added(start, most) <= seconds:
            count = most
        elif self._added(start, least) <= seconds:
            counts = range(least, most, MULTIPLE)
            count = counts[bisect_right(counts, seconds, key=lambda count: self._added(start, count)) - 1]
        else:
            count = 0 if self._has_prompt else least
        if count:
            self._seconds += self._added(start, count)
            self._num_tokens += count
            self._has_prompt = True
            if is_short:  # a long one lets it wait no longer than others
                self._for_long = min(self._for_long, self._limits.short_step_s)
        return count

    def _is_short(self, first: int, stop: int) -> bool:
        return self._limits.cost.added(0, first, stop - first) <= MAX_SHORT_STEPS * self._limits.short_step_s

    def _added(self, start: int, count: int) -> float:
        return self._limits.cost.added(self._num_tokens, start, count)


class PromptTurns:
    """By priority, then in the order in which they joined; but every other step begins with one that has much less left.

    So a short prompt waits a step at most for each of its own behind a long one, and the long one begins every other step
    whatever comes after it.
    """

    def __init__(self) -> None:
        self._is_least_first = True

    def next_order(self, prompts: Iterable[Sequence]) -> list[Sequence]:
        """Return `prompts`, which are in the order in which they joined, in that of their turns in the next step."""
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
