"""Forbids in the logits what grammars do not allow, for as long as tokens are picked from them.

Shapes: P rows, V vocabulary, G rows that have a grammar, W words of 32 tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from lori.device import to_device
from server.engine.sampling.grammar_state import Words

BOUNDS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf)
BOUNDS = BOUNDS.astype(np.float32)
"""(256, 8): for a byte of bits, what its tokens' logits are to be at most. A third of the time that a masked fill takes."""


class GrammarMasks:
    """Keeps memory to work in: on a CPU fresh memory of that size costs more than what is done in it."""

    def __init__(self) -> None:
        self._bounds = np.empty((0, 8), dtype=np.float32)
        self._before = np.empty((0, 0), dtype=np.float32)

    @contextmanager
    def confined(self, logits: torch.Tensor, allowed: Mapping[int, Words]) -> Iterator[None]:
        """Forbids all but the tokens `allowed` in those rows of `logits` (P, V), in place; at the end all is as it was.

        It does not wait for the device.
        """
        if not allowed:
            yield
        elif logits.device.type == "cpu":
            with self._confined_here(logits.numpy(), allowed):
                yield
        else:
            with _confined_there(logits, allowed):
                yield

    @contextmanager
    def _confined_here(self, logits: NDArray[np.float32], allowed: Mapping[int, Words]) -> Iterator[None]:
        self._reserve(logits.shape[1], allowed)
        rows = [*zip(allowed, self._before, strict=False)]
        for row, before in rows:
            np.copyto(before, logits[row])
        try:
            for row, tokens in allowed.items():
                np.take(BOUNDS, tokens.view(np.uint8), axis=0, out=self._bounds, mode="clip")
                np.minimum(logits[row], self._bounds.reshape(-1)[: logits.shape[1]], out=logits[row])
            yield
        finally:
            for row, before in rows:
                np.copyto(logits[row], before)

    def _reserve(self, num_tokens: int, allowed: Mapping[int, Words]) -> None:
        num_bytes = next(iter(allowed.values())).nbytes
        if len(self._bounds) != num_bytes:
            self._bounds = np.empty((num_bytes, 8), dtype=np.float32)
        if self._before.shape[0] < len(allowed) or self._before.shape[1] != num_tokens:
            self._before = np.empty((len(allowed), num_tokens), dtype=np.float32)


@contextmanager
def _confined_there(logits: torch.Tensor, allowed: Mapping[int, Words]) -> Iterator[None]:
    rows = to_device(torch.tensor([*allowed], dtype=torch.int64), logits.device)
    packed = to_device(torch.from_numpy(np.stack([*allowed.values()])), logits.device)  # (G, W)
    place = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_forbidden = (packed[:, :, None] >> place & 1 == 0).flatten(1)[:, : logits.shape[1]]  # (G, V)
    before = logits[rows]
    logits[rows] = before.masked_fill(is_forbidden, -torch.inf)
    try:
        yield
    finally:
        logits[rows] = before
