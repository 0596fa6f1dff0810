"""The budget of a step: its cost in seconds, and the prefill chunks that fit. No tensor, no clock.

The constants are measured when the server starts (`server.engine.startup`). A decoding step costs a time for its sequences and
for reading their keys. A prefill chunk adds its tokens, the reading of all keys before it once, and attention of each of its
tokens to these keys.
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
    """A curve of seconds over a count: linear between the measured points, and extrapolated from the last two."""

    counts: tuple[int, ...]
    """Ascending."""
    seconds: tuple[float, ...]
    """Never descending."""

    def __post_init__(self) -> None:
        assert len(self.counts) == len(self.seconds) >= 1
        assert all(before < after for before, after in pairwise(self.counts))
        assert all(before <= after for before, after in pairwise(self.seconds))

    def __call__(self, count: int) -> float:
        """Return the seconds of `count`, at least those of the first point."""
        if len(self.counts) == 1:
            return self.seconds[0]
        index = min(max(1, bisect(self.counts, count)), len(self.counts) - 1)
        (left, right), (low, high) = self.counts[index - 1 : index + 1], self.seconds[index - 1 : index + 1]
        return max(self.seconds[0], low + (high - low) * (count - left) / (right - left))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """The cost of a step, in seconds."""

    prompt: Curve
    """Cost of a step by its number of prompt tokens, each with few keys."""
    decoding: Curve
    """Cost of a step by its number of decoding sequences, each with few keys, without prompts."""
    per_key: float
    """Cost of reading one key for a chunk or a decoding token."""
    per_pair: float
    """Cost of one token attending to one key."""

    def decode_seconds(self, positions: Items[int]) -> float:
        """Return the seconds of a decoding step whose tokens stand at `positions`."""
        return self.decoding(len(positions)) + (self.per_key + self.per_pair) * sum(positions)

    def chunk_seconds(self, num_tokens: int, start: int, count: int) -> float:
        """Return the seconds that the tokens from `start` to `start + count` of a prompt add to a step of `num_tokens`."""
        product_seconds = self.prompt(num_tokens + count) - (self.prompt(num_tokens) if num_tokens else 0.0)
        return product_seconds + (self.per_key + self.per_pair * count) * (start + count / 2)

    def short_step_seconds(self) -> float:
        """Return the default limit on a step with short prompts, in seconds. It has room for enough tokens to be worth a step."""
        return min(max(MIN_SHORT_STEP_S, self.prompt(SHORT_STEP_TOKENS)), MAX_SHORT_STEP_S)


SHORT_STEP_TOKENS = 64
"""By default a step with short prompts may take as long as one of this many prompt tokens, within the next two limits."""
MIN_SHORT_STEP_S, MAX_SHORT_STEP_S = 0.035, 0.1
"""The maximum is for large models, and for a server that starts while the CPU is busy with other things."""
MIN_CHUNK_TOKENS = 4
"""Minimum chunk of a prompt, in tokens. A smaller chunk is not worth reading all keys before it, so none is computed."""
CHUNK_MULTIPLE = 2
"""Step sizes are rounded to a multiple of this many tokens: an odd size costs as much as the next even one."""
MAX_LONGER = 4
"""Maximum factor of a short step's time where many prompts are to be computed."""
MAX_SHORT_STEPS = 4
"""A prompt is long if computing it in one step costs more than this many short steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """Limits on the size of a step."""

    max_sequences: int
    max_tokens: int
    max_stall: float
    """Maximum duration of a step with prompts, as a multiple of decoding alone; infinity is no limit."""
    short_step_s: float
    """Seconds that a step with short prompts may take, if that is more than `max_stall` allows; see `StepBudget`."""
    cost: StepCost

    def __post_init__(self) -> None:
        assert self.max_tokens > self.max_sequences, "a step must have room for prompts beside decoding"
        assert self.max_stall >= 1

    def is_short(self, start: int, stop: int) -> bool:
        """Return whether a prompt is short whose tokens from `start` to `stop` have to be computed."""
        return self.cost.chunk_seconds(0, start, stop - start) <= MAX_SHORT_STEPS * self.short_step_s


class StepBudget:
    """The room that a step has beside the sequences that decode at `positions`. Without decoding sequences there is no time
    limit.

    A longer step delays those that decode, but brings first tokens sooner, since fewer steps read the weights. So the limit for
    short prompts is multiplied by 1 + `num_short` / number of decoding sequences, at most by `MAX_LONGER`. `num_short` is the
    number of prompts that may use it.
    """

    def __init__(self, limits: StepLimits, positions: Items[int], num_short: int) -> None:
        self._limits, self._num_tokens = limits, len(positions)
        self._spent_seconds, self._has_prompt = 0.0, False
        self._seconds_for_long = self._seconds_for_short = inf
        if positions:
            decode_seconds = limits.cost.decode_seconds(positions)
            self._seconds_for_long = (limits.max_stall - 1) * decode_seconds
            short_step_s = limits.short_step_s * min(1 + num_short / len(positions), MAX_LONGER)
            self._seconds_for_short = max(short_step_s - decode_seconds, self._seconds_for_long)

    def take(self, start: int, stop: int, *, prefill_start: int, may_exceed: bool = True) -> int:
        """Take room for the tokens from `start` to `stop` of a prompt. Return how many of them fit, from `start` on.

        `prefill_start` is where the prompt's computation began. A prompt counts as short by its length from there, not by the
        rest: otherwise the end of a long prompt would stall others longer than its beginning. With `may_exceed`, a short prompt
        may use the room reserved for short ones. The first prompt always gets some room, so that it finishes eventually.
        """
        max_count = min(stop - start, self._limits.max_tokens - self._num_tokens)
        if max_count <= 0 or (self._has_prompt and self._spent_seconds >= self._seconds_for_short):
            return 0
        is_short = may_exceed and self._limits.is_short(prefill_start, stop)
        seconds_left = (self._seconds_for_short if is_short else self._seconds_for_long) - self._spent_seconds
        min_count = min(max_count, MIN_CHUNK_TOKENS + (self._num_tokens + MIN_CHUNK_TOKENS) % CHUNK_MULTIPLE)
        if self._chunk_seconds(start, max_count) <= seconds_left:
            count = max_count
        elif self._chunk_seconds(start, min_count) <= seconds_left:
            counts = range(min_count, max_count, CHUNK_MULTIPLE)
            count = counts[bisect_right(counts, seconds_left, key=lambda count: self._chunk_seconds(start, count)) - 1]
        else:
            count = 0 if self._has_prompt else min_count
        if count:
            self._spent_seconds += self._chunk_seconds(start, count)
            self._num_tokens += count
            self._has_prompt = True
            if is_short:  # a long prompt must not delay a short one for longer than others
                self._seconds_for_long = min(self._seconds_for_long, self._limits.short_step_s)
        return count

    def _chunk_seconds(self, start: int, count: int) -> float:
        return self._limits.cost.chunk_seconds(self._num_tokens, start, count)


class PrefillOrder:
    """The order of prompts in a step: by priority, then as they started. Every other step begins with a much shorter one.

    A prompt goes first in such a step if it has at most half as many tokens left. So a short prompt waits at most one step for
    each of its own steps behind a long one, and the long one begins every other step, whatever comes after it.
    """

    def __init__(self) -> None:
        self._is_shortest_first = True

    def next_order(self, prompts: Iterable[Sequence]) -> list[Sequence]:
        """Return `prompts`, given in the order in which they started, in their order for the next step."""
        ordered = sorted(prompts, key=_priority)
        if len(ordered) < 2:
            self._is_shortest_first = True
            return ordered
        if self._is_shortest_first:
            shortest = min(ordered, key=lambda sequence: (_priority(sequence), _num_remaining(sequence)))
            if 2 * _num_remaining(shortest) <= _num_remaining(ordered[0]):
                ordered.remove(shortest)
                ordered.insert(0, shortest)
        self._is_shortest_first = not self._is_shortest_first
        return ordered


def _priority(sequence: Sequence) -> int:
    return sequence.priority


def _num_remaining(sequence: Sequence) -> int:
    return sequence.num_tokens - sequence.num_computed
