"""The adapters of a step's tokens: terms, and segments of consecutive tokens with the same terms.

Shapes: T tokens, G segments, M terms of segments, U slots that a step uses, L layers of the model.
"""

import operator
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lori.device import to_device

if TYPE_CHECKING:
    import _lori_cpu


Weight = float | tuple[float, ...]
"""The weight of a term: one number, or one for each layer of the model."""
ALIGNMENT = 4
"""Alignment of arrays in values of 4 bytes: 16 bytes, as Triton prefers."""


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter on a range of tokens: adds `weight * B_slot s[t]` to y[t] for start <= t < stop.

    `weight` includes the adapter's alpha / r.
    """

    start: int
    stop: int
    slot: int
    weight: Weight


class Route:
    """The terms of one step of `num_tokens` tokens. Built once a step, used by every layer, immutable.

    `segments` (G, 4) int32, ascending, holds `start, stop, first, last`: the tokens start <= t < stop have the terms
    first <= m < last of `slots` (M,) int32 and `weights` (M,) fp32. Tokens without terms are in no segment. Consecutive tokens
    with the same terms share a segment. A token has at most one term for a slot.

    Where a weight depends on the layer, `weights` is (L, M). Kernels take the route of one layer, see `layer_route`.
    """

    def __init__(self, segments: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, num_tokens: int) -> None:
        self.segments, self.slots, self.weights, self.num_tokens = segments, slots, weights, num_tokens
        self.is_by_token = False
        """Whether segment t holds exactly token t, see `by_token`."""
        self.cpu: _lori_cpu.Route | None = None
        """Cache of the kernel `cpu`: its view of the arrays."""
        self.gpu: dict[str, object] = {}
        """Cache of the kernel `gpu`. A dict, so that a plan made by one layer's route serves all."""
        self._layers: dict[int, Route] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"cpu": None, "gpu": {}, "_layers": {}}

    @classmethod
    def from_terms(cls, terms: Iterable[Term], num_tokens: int, device: torch.device | str = "cpu") -> "Route":
        """Build the route of `terms`, which must lie within the step's tokens."""
        segments: list[tuple[int, int, int, int]] = []
        slots: list[int] = []
        weights: list[Weight] = []
        terms = sorted(terms, key=lambda term: term.start)
        assert all(0 <= term.start < term.stop <= num_tokens and 0 <= term.slot < 2**31 for term in terms)
        previous: dict[int, Weight] = {}
        for start, stop, slot_weights in _segments(terms):
            if slot_weights == previous and segments[-1][1] == start:
                segments[-1] = (segments[-1][0], stop, *segments[-1][2:])
                continue
            previous = slot_weights
            segments.append((start, stop, len(slots), len(slots) + len(slot_weights)))
            slots += slot_weights.keys()
            weights += slot_weights.values()
        target, padding = torch.device(device), [0.0] * (-len(weights) % ALIGNMENT)
        route = cls(
            to_device(torch.tensor(segments, dtype=torch.int32).view(-1, 4), target),
            to_device(torch.tensor(slots, dtype=torch.int32), target),
            to_device(torch.from_numpy(np.ascontiguousarray(weight_array([*weights, *padding]))), target)[..., : len(weights)],
            num_tokens,
        )
        route.segment_list = segments
        return route

    @classmethod
    def by_token(cls, segments: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> "Route":
        """Return a route with one segment for each token; a token without terms has `first` = `last`.

        The shapes do not depend on the terms, so a captured launch stays valid when the content of the arrays changes. Only for
        kernels that accept segments without terms: `gpu` and `reference`. `weights` may be (L, M).
        """
        route = cls(segments, slots, weights, len(segments))
        route.is_by_token = True
        return route

    def layer_route(self, number: int) -> "Route":
        """Return the route of a layer: this one, if no weight depends on the layer. Each is made once."""
        if self.weights.dim() == 1:
            return self
        if number not in self._layers:
            route = copy(self)
            route.weights, route.gpu = self.weights[number], self.gpu
            self._layers[number] = route
        return self._layers[number]

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


def weight_array(weights: Sequence[Weight]) -> NDArray[np.float32]:
    """Return M weights as an array (M,), or (L, M) if one of them depends on the layer."""
    num_layers = next((len(weight) for weight in weights if isinstance(weight, tuple)), 0)
    if not num_layers:
        return np.array(weights, np.float32)
    return np.array([_by_layer(weight, num_layers) for weight in weights], np.float32).T


def _by_layer(weight: Weight, num_layers: int) -> tuple[float, ...]:
    return weight if isinstance(weight, tuple) else (weight,) * num_layers


def _sum(weight: Weight, other: Weight) -> Weight:
    if not isinstance(weight, tuple) and not isinstance(other, tuple):
        return weight + other
    num_layers = max(len(value) for value in (weight, other) if isinstance(value, tuple))
    return tuple(map(operator.add, _by_layer(weight, num_layers), _by_layer(other, num_layers)))


def _segments(terms: Sequence[Term]) -> Iterable[tuple[int, int, dict[int, Weight]]]:
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
        slot_weights: dict[int, Weight] = {}
        for term in active:
            slot_weights[term.slot] = _sum(slot_weights[term.slot], term.weight) if term.slot in slot_weights else term.weight
        if slot_weights:
            yield start, stop, slot_weights
