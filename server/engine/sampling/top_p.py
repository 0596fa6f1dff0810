"""Which tokens top-k, top-p and min-p leave to be drawn: of equally likely ones those of the lowest ids.

One meaning, two ways. `cut` sorts whole rows and never waits for the device. `draw_few` is the CPU's: it sorts only tokens that
are likely enough to matter, a few hundred of a vocabulary.

Shapes: R rows, V vocabulary, C candidates.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from lori.device import to_device
from server.engine.request import Sampling

Floats = NDArray[np.float32]

NUM_GROUPS = 768
"""Groups of tokens whose likeliest ones bound the k-th likeliest of all from below."""
SHARES = (2.0**-8, 2.0**-12)
"""Tokens below this share of 1 - top_p are left aside at first, then the next: only a flat distribution needs them."""


@dataclass(frozen=True, slots=True)
class Cutoff:
    """What one row leaves; `top_k` 0 leaves all."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, sampling: Sampling) -> Self:
        """Return that of a request."""
        return cls(sampling.top_k, sampling.top_p, sampling.min_p)

    @property
    def is_none(self) -> bool:
        """Whether it leaves everything."""
        return self == Cutoff()


def cut(probabilities: torch.Tensor, cutoffs: Items[Cutoff]) -> torch.Tensor:
    """Return `probabilities` (R, V) with zeros in place of what is left out."""
    num_tokens, device = probabilities.shape[1], probabilities.device
    fields = [[c.top_k or num_tokens, c.top_p if c.top_p < 1 else 2.0, c.min_p, c.top_k > 0] for c in cutoffs]
    top_k, top_p, min_p, is_within = to_device(torch.tensor(fields, dtype=torch.float64), device).split(1, dim=1)  # each (R, 1)
    values, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(num_tokens, device=device)
    mass = values.double().where(place < top_k, 0.0).cumsum(-1)
    whole = mass[:, -1:].where(is_within > 0, 1.0)
    before = mass.roll(1, dims=-1)
    before[:, 0] = -1.0  # The first stays, whatever top_p is.
    is_kept = (place < top_k) & (before < top_p * whole) & (values >= min_p.float() * values[:, :1])
    return torch.zeros_like(probabilities).scatter_(1, ids, values.where(is_kept, 0.0))


def draw_few(probabilities: Floats, cutoffs: Items[Cutoff], levels: Items[float]) -> list[int]:
    """Return the token that `levels`, in [0, 1), draw from what is left of each row of `probabilities` (R, V)."""
    return [_draw(row, cutoff, level) for row, cutoff, level in zip(probabilities, cutoffs, levels, strict=True)]


def _draw(row: Floats, cutoff: Cutoff, level: float) -> int:
    ids = _candidates(row, cutoff)  # (C,), rising
    if not len(ids):
        return 0  # The row holds no numbers.
    values = row[ids]
    mass = np.where(_is_left(values, cutoff), values, 0).cumsum(dtype=np.float64)
    target = min(level * mass[-1], np.nextafter(mass[-1], 0))
    return int(ids[mass.searchsorted(target, side="right")])


def _candidates(row: Floats, cutoff: Cutoff) -> NDArray[np.intp]:
    # All tokens that may be left, and as few others as can be told without sorting.
    if cutoff.top_k:
        return np.flatnonzero(row >= _kth_at_least(row, cutoff.top_k))
    if cutoff.top_p >= 1:
        return np.flatnonzero(row >= np.float32(cutoff.min_p) * row.max())
    spare = 1 - cutoff.top_p
    for share in SHARES:
        ids = np.flatnonzero(row >= spare * share)
        if len(ids) and row[ids].sum(dtype=np.float64) >= cutoff.top_p:
            return ids
    # What is below this weighs less than `spare`, all together.
    return np.flatnonzero(row >= spare / 2 / len(row))


def _kth_at_least(row: Floats, top_k: int) -> np.float32:
    num_tokens = len(row)
    if top_k >= num_tokens:
        return np.float32(0)
    if top_k > NUM_GROUPS or num_tokens < NUM_GROUPS:
        return np.float32(np.partition(row, num_tokens - top_k)[num_tokens - top_k])
    # Whatever the groups, the k-th largest of their maxima is at most the k-th largest of all.
    maxima = row[: num_tokens // NUM_GROUPS * NUM_GROUPS].reshape(-1, NUM_GROUPS).max(axis=0)
    return np.float32(np.partition(maxima, NUM_GROUPS - top_k)[NUM_GROUPS - top_k])


def _is_left(values: Floats, cutoff: Cutoff) -> NDArray[np.bool_]:
    # Of the candidates, in order of their ids.
    order = np.sort(values)[::-1][: cutoff.top_k or None]
    num_left = int((order >= np.float32(cutoff.min_p) * order[0]).sum())
    if cutoff.top_p < 1:
        mass = order.cumsum(dtype=np.float64)
        whole = mass[-1] if cutoff.top_k else 1.0
        num_left = min(num_left, int(mass.searchsorted(cutoff.top_p * whole)) + 1)
    least = order[num_left - 1]
    is_left: NDArray[np.bool_] = values > least
    alike = np.flatnonzero(values == least)
    is_left[alike[: num_left - np.count_nonzero(is_left)]] = True
    return is_left
