"""How often each token stands in a sequence's output: kept as it grows, not counted again at each step."""

from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """The distinct tokens of a sequence, and how often each is in the output; those of the prompt alone are there with 0."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.fromiter(self._places, dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._num_counted = 0

    def update(self, output_ids: Items[int]) -> None:
        """Counts what the output has more than at the last call."""
        for token in output_ids[self._num_counted :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._grow()
            self._ids[place] = token
            self._counts[place] += 1
        self._num_counted = len(output_ids)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens, each once."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` is in the output."""
        return self._counts[: len(self._places)]

    def _grow(self) -> None:
        num_more = max(64, len(self._ids))
        self._ids = np.concatenate([self._ids, np.zeros(num_more, np.int64)])
        self._counts = np.concatenate([self._counts, np.zeros(num_more, np.float32)])
