"""What a step costs, by its tokens and the keys that they read, and how much of a prompt it has room for. No tensor, no clock.

The constants are measured when the server starts (`server.engine.step_timing`). A step that decodes costs what so many sequences
cost, and their keys. A prompt's chunk beside them adds its tokens, and what those read of the keys before them: each chunk reads
them once, whatever its length, and each of its tokens attends to them.
"""

from bisect import bisect, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

LEAST = 4
"""Tokens of a prompt for which it is worth reading all the keys before them: where there is no time for so many, none run."""
MULTIPLE = 2
"""Of a step's tokens: an odd one costs as much as two."""
MAX_SHORT_STEPS = 4
"""A prompt that needs more steps is long."""


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
        """Returns what `count` cost; no less than the first point."""
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

    def usual(self, positions: Sequence[int]) -> float:
        """Returns the seconds of a step of one token of a sequence at each of `positions`."""
        return self.decoding(len(positions)) + (self.per_key + self.per_pair) * sum(positions)

    def added(self, num_tokens: int, start: int, count: int) -> float:
        """Returns the seconds that the tokens `start` to `start + count` of a prompt add to a step of `num_tokens`."""
        in_products = self.prompt(num_tokens + count) - (self.prompt(num_tokens) if num_tokens else 0.0)
        return in_products + (self.per_key + self.per_pair * count) * (start + count / 2)


class Room:
    """What a step of `max_tokens` has room for beside the sequences that decode at `positions`.

    Prompts make it take `max_stall` times as long as without, at most. Short ones may make it take `short_step_s` where that is
    more: by themselves they are computed in no more than `MAX_SHORT_STEPS` of so many seconds. Where none decodes there is
    nobody to be stalled.
    """

    def __init__(
        self, cost: StepCost, *, max_tokens: int, max_stall: float, short_step_s: float, positions: Sequence[int] = ()
    ) -> None:
        self._cost, self._max_tokens, self._num_decoding = cost, max_tokens, len(positions)
        self._most_of_short = short_step_s * MAX_SHORT_STEPS
        self._num_tokens, self._seconds = len(positions), 0.0
        self._for_long = self._for_short = inf
        if positions:
            usual = cost.usual(positions)
            self._for_long = (max_stall - 1) * usual
            self._for_short = max(short_step_s - usual, self._for_long)

    def take(self, start: int, num_tokens: int, first: int = 0) -> int:
        """Takes room for the tokens of a prompt from `start` on, `num_tokens` at most, and returns for how many there was.

        `first`: where its computing began. Whether it is short is seen by all from there on, not by what is left: else the end of
        a long one would stall others more than what came before. The first prompt always gets some room, so that it comes to its
        end.
        """
        is_short = self._cost.added(0, first, start + num_tokens - first) <= self._most_of_short
        seconds = (self._for_short if is_short else self._for_long) - self._seconds
        most = min(num_tokens, self._max_tokens - self._num_tokens)
        counts = range(LEAST + (self._num_tokens + LEAST) % MULTIPLE, most, MULTIPLE)
        if self._added(start, most) <= seconds:
            count = most
        elif place := bisect_right(counts, seconds, key=lambda count: self._added(start, count)):
            count = counts[place - 1]
        else:
            count = 0 if self._num_tokens > self._num_decoding else min(most, counts.start)
        self._seconds += self._added(start, count)
        self._num_tokens += count
        return count

    def _added(self, start: int, count: int) -> float:
        return self._cost.added(self._num_tokens, start, count) if count else 0.0
