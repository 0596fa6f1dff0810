"""The adapters of a step's tokens: terms, and segments of consecutive tokens with the same terms.

Shapes: T tokens, G segments, M terms of segments, U slots that a step uses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from lori.device import to_device

if TYPE_CHECKING:
    import _lori_cpu


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter on a range of tokens: adds `weight * B_slot s[t]` to y[t] for start <= t < stop.

    `weight` includes the adapter's alpha / r.
    """

    start: int
    stop: int
    slot: int
    weight: float


class Route:
    """The terms of one step of `num_tokens` tokens. Built once a step, used by every layer, immutable.

    `segments` (G, 4) int32, ascending, holds `start, stop, first, last`: the tokens start <= t < stop have the terms
    first <= m < last of `slots` (M,) int32 and `weights` (M,) fp32. Tokens without terms are in no segment. Consecutive tokens
    with the same terms share a segment. A token has at most one term for a slot.
    """

    def __init__(self, segments: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, num_tokens: int) -> None:
        self.segments, self.slots, self.weights, self.num_tokens = segments, slots, weights, num_tokens
        self.is_by_token = False
        """Whether segment t holds exactly token t, see `by_token`."""
        self.cpu: _lori_cpu.Route | None = None
        self.gpu: object = None
        """Cache of the kernel of that name: its view or plan of the arrays."""

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"cpu": None, "gpu": None}

    @classmethod
    def from_terms(cls, terms: Iterable[Term], num_tokens: int, device: torch.device | str = "cpu") -> "Route":
        """Build the route of `terms`, which must lie within the step's tokens."""
        segments: list[tuple[int, int, int, int]] = []
        slots: list[int] = []
        weights: list[float] = []
        terms = sorted(terms, key=lambda term: term.start)
        assert all(0 <= term.start < term.stop <= num_tokens and 0 <= term.slot < 2**31 for term in terms)
        previous: dict[int, float] = {}
        for start, stop, slot_weights in _segments(terms):
            if slot_weights == previous and segments[-1][1] == start:
                segments[-1] = (segments[-1][0], stop, *segments[-1][2:])
                continue
            previous = slot_weights
            segments.append((start, stop, len(slots), len(slots) + len(slot_weights)))
            slots += slot_weights.keys()
            weights += slot_weights.values()
        target = torch.device(device)
        route = cls(
            to_device(torch.tensor(segments, dtype=torch.int32).view(-1, 4), target),
            to_device(torch.tensor(slots, dtype=torch.int32), target),
            to_device(torch.tensor(weights, dtype=torch.float32), target),
            num_tokens,
        )
        route.segment_list = segments
        return route

    @classmethod
    def by_token(cls, segments: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> "Route":
        """Return a route with one segment for each token; a token without terms has `first` = `last`.

        The shapes do not depend on the terms, so a captured launch stays valid when the content of the arrays changes. Only for
        kernels that accept segments without terms: `gpu` and `reference`.
        """
        route = cls(segments, slots, weights, len(segments))
        route.is_by_token = True
        return route

    @cached_property
    def segment_list(self) -> list[tuple[int, int, int, int]]:
        """`segments` as Python ints. Waits for the device, except for a route made by `from_terms`."""
        return [(start, stop, first, last) for start, stop, first, last in self.segments.tolist()]

    @cached_property
    def spans(self) -> list[tuple[int, int, list[tuple[int, float]]]]:
        """Start and stop of each segment, and the (slot, weight) of each of its terms."""
        terms = list(zip(self.slots.tolist(), self.weights.tolist(), strict=True))
        return [(start, stop, terms[first:last]) for start, stop, first, last in self.segment_list]

    @cached_property
    def weight_matrix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots in use (U,) int64, ascending, and their weights on each token (T, U) fp32."""
        used = self.slots.long().unique()
        counts = (self.segments[:, 3] - self.segments[:, 2]).long()
        segment_weights = torch.zeros(len(counts), len(used), device=used.device)
        rows = torch.arange(len(counts), device=used.device).repeat_interleave(counts)
        segment_weights[rows, torch.searchsorted(used, self.slots.long())] = self.weights
        weights = torch.zeros(self.num_tokens, len(used), device=used.device)
        lengths = (self.segments[:, 1] - self.segments[:, 0]).long()
        first = self.segments[:, 0].long().repeat_interleave(lengths)
        within = torch.arange(len(first), device=used.device) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        weights[first + within] = segment_weights.repeat_interleave(lengths, dim=0)
        return used, weights


def _segments(terms: Sequence[Term]) -> Iterable[tuple[int, int, dict[int, float]]]:
    """Yield start, stop and the weight of each slot for each range of tokens between two cuts that has terms.

    A cut is the start or the stop of a term. `terms` must be sorted by start.
    """
    cuts = sorted({cut for term in terms for cut in (term.start, term.stop)})
    active: list[Term] = []
    following = 0
    for start, stop in pairwise(cuts):
        active = [term for term in active if term.stop > start]
        while following < len(terms) and terms[following].start == start:
            active.append(terms[following])
            following += 1
        slot_weights: dict[int, float] = {}
        for term in active:
            slot_weights[term.slot] = slot_weights.get(term.slot, 0.0) + term.weight
        if slot_weights:
            yield start, stop, slot_weights
