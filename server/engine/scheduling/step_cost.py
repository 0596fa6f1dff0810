"""What a step costs, by its tokens and the keys that they read. No tensor, no clock.

The constants are measured when the server starts (`server.engine.step_timing`). A step that decodes costs what so many sequences
cost, and their keys. A prompt's chunk beside them adds its tokens, and what those read of the keys before them: each chunk reads
them once, whatever its length, and each of its tokens attends to them.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


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
