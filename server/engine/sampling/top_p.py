"""Top-k, top-p and min-p: the tokens that may be drawn. Of equally likely tokens, those with the lowest ids are kept.

Two implementations have the same result. `apply_cutoffs` sorts whole rows and never waits for the device. `draw_candidates` is
for a CPU: it sorts only tokens that are likely enough to matter, a few hundred of a vocabulary.

Shapes: R rows, V vocabulary, C candidates.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from lori.device import to_device
from server.engine.request import SamplingParams

Floats = NDArray[np.float32]

NUM_GROUPS = 768
"""Number of groups of tokens. The k-th largest of the groups' maxima is a lower bound of the k-th largest probability."""
CANDIDATE_SHARES = (2.0**-8, 2.0**-12)
"""Fractions of 1 - top_p, tried in order. Less likely tokens are left out at first: only a flat distribution needs them."""


@dataclass(frozen=True, slots=True)
class Cutoff:
    """The top-k, top-p and min-p of one row. `top_k` 0 keeps all tokens."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def from_sampling(cls, sampling: SamplingParams) -> Self:
        """Return the cutoff of a request."""
        return cls(sampling.top_k, sampling.top_p, sampling.min_p)

    @property
    def is_none(self) -> bool:
        """Whether the cutoff keeps all tokens."""
        return self == Cutoff()


def apply_cutoffs(probabilities: torch.Tensor, cutoffs: Items[Cutoff]) -> torch.Tensor:
    """Return `probabilities` (R, V) with zeros in place of the tokens that are cut off."""
    num_tokens, device = probabilities.shape[1], probabilities.device
    rows = [[c.top_k or num_tokens, c.top_p if c.top_p < 1 else 2.0, c.min_p, c.top_k > 0] for c in cutoffs]
    top_k, top_p, min_p, has_top_k = to_device(torch.tensor(rows, dtype=torch.float64), device).split(1, dim=1)  # each (R, 1)
    values, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(num_tokens, device=device)
    mass = values.double().where(ranks < top_k, 0.0).cumsum(-1)
    total = mass[:, -1:].where(has_top_k > 0, 1.0)
    mass_before = mass.roll(1, dims=-1)
    mass_before[:, 0] = -1.0  # the first token is kept, whatever top_p is
    is_kept = (ranks < top_k) & (mass_before < top_p * total) & (values >= min_p.float() * values[:, :1])
    return torch.zeros_like(probabilities).scatter_(1, ids, values.where(is_kept, 0.0))


def draw_candidates(probabilities: Floats, cutoffs: Items[Cutoff], uniforms: Items[float]) -> list[int]:
    """Return the token that `uniforms`, in [0, 1), draw from the remaining tokens of each row of `probabilities` (R, V)."""
    return [_draw(row, cutoff, uniform) for row, cutoff, uniform in zip(probabilities, cutoffs, uniforms, strict=True)]


def _draw(row: Floats, cutoff: Cutoff, uniform: float) -> int:
    ids = _candidates(row, cutoff)  # (C,), ascending
    if not len(ids):
        return 0  # the row has only NaN
    values = row[ids]
    mass = np.where(_keep_mask(values, cutoff), values, 0).cumsum(dtype=np.float64)
    target = min(uniform * mass[-1], np.nextafter(mass[-1], 0))
    return int(ids[mass.searchsorted(target, side="right")])


def _candidates(row: Floats, cutoff: Cutoff) -> NDArray[np.intp]:
    # All tokens that may be kept, and as few others as possible without sorting.
    if cutoff.top_k:
        return np.flatnonzero(row >= _kth_lower_bound(row, cutoff.top_k))
    if cutoff.top_p >= 1:
        return np.flatnonzero(row >= np.float32(cutoff.min_p) * row.max())
    spare = 1 - cutoff.top_p
    for share in CANDIDATE_SHARES:
        ids = np.flatnonzero(row >= spare * share)
        if len(ids) and row[ids].sum(dtype=np.float64) >= cutoff.top_p:
            return ids
    # All tokens below this together have less probability than `spare`.
    return np.flatnonzero(row >= spare / 2 / len(row))


def _kth_lower_bound(row: Floats, top_k: int) -> np.float32:
    num_tokens = len(row)
    if top_k >= num_tokens:
        return np.float32(0)
    if top_k > NUM_GROUPS or num_tokens < NUM_GROUPS:
        return np.float32(np.partition(row, num_tokens - top_k)[num_tokens - top_k])
    # For any grouping, the k-th largest of the groups' maxima is at most the k-th largest value.
    maxima = row[: num_tokens // NUM_GROUPS * NUM_GROUPS].reshape(-1, NUM_GROUPS).max(axis=0)
    return np.float32(np.partition(maxima, NUM_GROUPS - top_k)[NUM_GROUPS - top_k])


def _keep_mask(values: Floats, cutoff: Cutoff) -> NDArray[np.bool_]:
    # Mask of the kept candidates, which are in the order of their ids.
    descending = np.sort(values)[::-1][: cutoff.top_k or None]
    num_left = int((descending >= np.float32(cutoff.min_p) * descending[0]).sum())
    if cutoff.top_p < 1:
        mass = descending.cumsum(dtype=np.float64)
        total = mass[-1] if cutoff.top_k else 1.0
        num_left = min(num_left, int(mass.searchsorted(cutoff.top_p * total)) + 1)
    threshold = descending[num_left - 1]
    is_kept: NDArray[np.bool_] = values > threshold
    ties = np.flatnonzero(values == threshold)
    is_kept[ties[: num_left - np.count_nonzero(is_kept)]] = True
    return is_kept
