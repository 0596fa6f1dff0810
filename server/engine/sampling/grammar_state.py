"""Where one sequence's output stands in its grammar, and which tokens may come next. No torch.

Shapes: W words of 32 tokens, the lowest bit first.
"""

import time
from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from server.engine.sampling.grammar_compiler import fault

Words = NDArray[np.int32]

SECONDS, SECONDS_PER_TOKEN = 0.1, 0.002
"""Of computing, that a sequence has for its masks: others wait for them. It is some twenty times what they take in practice."""


def words(tokens: Iterable[int], num_tokens: int) -> Words:
    """Returns (W,): the bits of `tokens`, of `num_tokens` that there are."""
    bits = np.zeros(-(-num_tokens // 32) * 32, dtype=bool)
    bits[[token for token in tokens if token < num_tokens]] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


class GrammarState:
    """Follows the output of one sequence with a `matcher` of its own.

    It is to hear of the same output, grown or as it was, however often the sequence is computed.
    """

    def __init__(self, matcher: LLMatcher, stops: Words) -> None:
        self._matcher, self._stops = matcher, stops
        self._num_read, self._seconds = -1, SECONDS
        self.allowed = np.zeros_like(stops)
        """(W,): the tokens that may come next; a stop token where the output may end."""
        self.fault = ""
        """Why it can be followed no further; then nothing is allowed."""

    def follow(self, output_ids: Items[int]) -> None:
        """Reads what the output has more than at the last call, and finds what may come next."""
        if self.fault or len(output_ids) == self._num_read:
            return
        started = time.thread_time()
        self._read(output_ids[max(0, self._num_read) :])
        self._num_read = len(output_ids)
        self._seconds += SECONDS_PER_TOKEN - (time.thread_time() - started)
        if not self.fault and self._seconds < 0:
            self.fault = "the grammar takes too long to say what may come next"
        if self.fault:
            self.allowed[:] = 0

    @property
    def can_only_end(self) -> bool:
        """Whether nothing may come next but a stop token."""
        return not (self.allowed & ~self._stops).any()

    def _read(self, tokens: Items[int]) -> None:
        self._matcher.consume_tokens([*tokens])
        self._matcher.unsafe_compute_mask_ptr(self.allowed.ctypes.data, self.allowed.nbytes)
        if said := fault(self._matcher):
            self.fault = f"the grammar can be followed no further: {said}"
