"""How much of its prompts a step has room for, beside the sequences that decode. No tensor, no clock."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from server.engine.scheduling.step_cost import StepCost

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

    def __init__(self, limits: StepLimits, positions: Sequence[int]) -> None:
        self._limits, self._num_tokens = limits, len(positions)
        self._seconds, self._has_prompt = 0.0, False
        self._for_long = self._for_short = inf
        if positions:
            usual = limits.cost.usual(positions)
            self._for_long = (limits.max_stall - 1) * usual
            self._for_short = max(limits.short_step_s - usual, self._for_long)

    def take(self, start: int, stop: int, *, first: int, may_exceed: bool = True) -> int:
        """Takes room for the tokens `start` to `stop` of a prompt, and returns for how many from `start` on there was.

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
