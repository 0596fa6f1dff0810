"""The random numbers behind the draws: a counter-based stream for each choice of a request.

Philox 4x64 with 10 rounds (Salmon et al. 2011), whose raw words NumPy promises to keep: the key is (seed, choice), the counter is
the number of output tokens so far. So a number depends on neither the rest of the batch nor what was drawn before it.
"""

import numpy as np

NUM_AHEAD = 64
"""Numbers that are made at once: one costs nearly as much as all of these."""


def uniforms(seed: int, choice: int, position: int, count: int) -> list[float]:
    """Returns the `count` numbers in [0, 1) that decide the tokens from `position` on."""
    words = np.random.Philox(key=seed | choice << 64, counter=position).random_raw(4 * count)
    firsts = words[::4]  # of the four that each counter gives
    numbers: list[float] = ((firsts >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers


class RandomStream:
    """The numbers in [0, 1) of one choice, by position; in order they cost the least."""

    def __init__(self, seed: int, choice: int = 0) -> None:
        self._seed, self._choice = seed, choice
        self._first, self._ahead = 0, list[float]()

    def at(self, position: int) -> float:
        """Returns the number that decides token `position` of the output."""
        if not self._first <= position < self._first + len(self._ahead):
            self._first, self._ahead = position, uniforms(self._seed, self._choice, position, NUM_AHEAD)
        return self._ahead[position - self._first]
