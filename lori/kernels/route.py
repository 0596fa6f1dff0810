"""Which adapters a step's tokens use: terms, and the segments of tokens that have the same ones.

Shapes: T tokens, G segments, M terms of segments, U slots that a step uses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from lori.device import to_device

LONG = 40
"""Tokens of a segment from which on it may be worth while to unpack a B: that of a dense one of 14336 outputs."""


@dataclass(frozen=True, slots=True)
class Term:
    """`weight * B_slot s[t]` is added to y[t] for start <= t < stop. `weight` has the adapter's alpha / r in it."""

    start: int
    stop: int
    slot: int
    weight: float


class Route:
    """The terms of one step of `num_tokens` tokens: built once a step, used by every layer, never changed.

    `segments` (G, 4) int32, ascending: `start, stop, first, last`; the tokens start <= t < stop have the terms first <= m < last
    of `slots` (M,) int32 and `weights` (M,) fp32. Tokens without terms are in none, neighbours with the same are in one. Terms of
    one slot on one token are one.
    """

    def __init__(self, segments: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, num_tokens: int) -> None:
        self.segments, self.slots, self.weights, self.num_tokens = segments, slots, weights, num_tokens
        self.is_by_token = False
        """Whether segment t is token t's, see `by_token`."""
        self.cpu: object = None
        self.gpu: object = None
        """What the kernel of that name made of the arrays above."""
        self._without: dict[tuple[int, ...], Route] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"cpu": None, "gpu": None, "_without": {}}

    @classmethod
    def of(cls, terms: Iterable[Term], num_tokens: int, device: torch.device | str = "cpu") -> "Route":
        """Build the route of `terms`, each within the step's tokens."""
        segments: list[tuple[int, int, int, int]] = []
        slots: list[int] = []
        weights: list[float] = []
        terms = sorted(terms, key=lambda term: term.start)
        assert all(0 <= term.start < term.stop <= num_tokens and 0 <= term.slot < 2**31 for term in terms)
        before: dict[int, float] = {}
        for start, stop, added in _segments(terms):
            if added == before and segments[-1][1] == start:
                segments[-1] = (segments[-1][0], stop, *segments[-1][2:])
                continue
            before = added
            segments.append((start, stop, len(slots), len(slots) + len(added)))
            slots += added.keys()
            weights += added.values()
        there = torch.device(device)
        route = cls(
            to_device(torch.tensor(segments, dtype=torch.int32).view(-1, 4), there),
            to_device(torch.tensor(slots, dtype=torch.int32), there),
            to_device(torch.tensor(weights, dtype=torch.float32), there),
            num_tokens,
        )
        route.rows = segments
        return route

    @classmethod
    def by_token(cls, segments: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> "Route":
        """Return the route of one segment for each token, with no terms (`first` = `last`) where it has none.

        So the shapes do not depend on the terms: what a kernel launches stays right as the arrays change. For kernels that take
        segments without terms: `gpu` and `reference`.
        """
        route = cls(segments, slots, weights, len(segments))
        route.is_by_token = True
        return route

    def without(self, left_out: tuple[int, ...]) -> "Route":
        """Return the route without the segments of these numbers; the same one for every layer."""
        if left_out not in self._without:
            kept = [i for i in range(len(self.segments)) if i not in left_out]
            self._without[left_out] = Route(self.segments[kept], self.slots, self.weights, self.num_tokens)
        return self._without[left_out]

    @cached_property
    def rows(self) -> list[tuple[int, int, int, int]]:
        """`segments` as plain numbers. A route that `of` made need not ask the device for them."""
        return [(start, stop, first, last) for start, stop, first, last in self.segments.tolist()]

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """The segments of one term that are `LONG`: number, tokens and slot of each."""
        return tuple(
            (i, stop - start, terms[0][0])
            for i, (start, stop, terms) in enumerate(self.spans)
            if len(terms) == 1 and stop - start >= LONG
        )

    @cached_property
    def spans(self) -> list[tuple[int, int, list[tuple[int, float]]]]:
        """Each segment's start and stop, and the slot and weight of each of its terms."""
        terms = list(zip(self.slots.tolist(), self.weights.tolist(), strict=True))
        return [(start, stop, terms[first:last]) for start, stop, first, last in self.rows]

    @cached_property
    def matrix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots that the step uses (U,) int64, ascending, and (T, U) fp32: the weight that each has on each token."""
        used = self.slots.long().unique()
        counts = (self.segments[:, 3] - self.segments[:, 2]).long()
        of_segment = torch.zeros(len(counts), len(used), device=used.device)
        rows = torch.arange(len(counts), device=used.device).repeat_interleave(counts)
        of_segment[rows, torch.searchsorted(used, self.slots.long())] = self.weights
        weights = torch.zeros(self.num_tokens, len(used), device=used.device)
        lengths = (self.segments[:, 1] - self.segments[:, 0]).long()
        first = self.segments[:, 0].long().repeat_interleave(lengths)
        within = torch.arange(len(first), device=used.device) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        weights[first + within] = of_segment.repeat_interleave(lengths, dim=0)
        return used, weights


def _segments(terms: Sequence[Term]) -> Iterable[tuple[int, int, dict[int, float]]]:
    # Sweeps over the places where a term starts or stops; yields those stretches that have terms, with the weight of each slot.
    cuts = sorted({cut for term in terms for cut in (term.start, term.stop)})
    active: list[Term] = []
    following = 0
    for start, stop in pairwise(cuts):
        active = [term for term in active if term.stop > start]
        while following < len(terms) and terms[following].start == start:
            active.append(terms[following])
            following += 1
        added: dict[int, float] = {}
        for term in active:
            added[term.slot] = added.get(term.slot, 0.0) + term.weight
        if added:
            yield start, stop, added
