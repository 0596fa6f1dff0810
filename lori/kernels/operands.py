"""The run-time layout of the resident adapters' B, and which of them a step's tokens use. The kernels alone know it.

Shapes: T tokens, D outputs, R rank, S slots, U slots that a step uses, A bases.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Term:
    """`weight * B_slot s[t]` is added to y[t] for start <= t < stop. `weight` has the adapter's alpha / r in it."""

    start: int
    stop: int
    slot: int
    weight: float


@dataclass(frozen=True, slots=True)
class Route:
    """The terms of one step, and the same as a matrix: built once a step, used by every layer.

    `slots` (U,) int64 and `weights` (T, U) fp32: token t gets the sum over u of `weights[t, u] * B_slots[u] s[t]`.
    """

    terms: tuple[Term, ...]
    slots: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, terms: Iterable[Term], num_tokens: int, device: torch.device | str = "cpu") -> "Route":
        """Builds the route of a step of `num_tokens` tokens. Terms of one slot on one token add."""
        terms = tuple(terms)
        slots = sorted({term.slot for term in terms})
        column = {slot: u for u, slot in enumerate(slots)}
        weights = torch.zeros(num_tokens, len(slots))
        for term in terms:
            weights[term.start : term.stop, column[term.slot]] += term.weight
        return cls(terms, torch.tensor(slots, dtype=torch.int64, device=device), weights.to(device))


class Operands:
    """The B of every resident adapter for one module: `pool` (S, R, D), B transposed, zero rows past an adapter's rank.

    `basis_of` (S,) says which block of s (T, A, R) a slot's B is applied to. Slots of one module are the same slots of all.
    """

    def __init__(self, num_slots: int, rank: int, num_outputs: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.pool = torch.zeros(num_slots, rank, num_outputs, dtype=dtype, device=device)
        self.basis_of = torch.zeros(num_slots, dtype=torch.int64, device=device)

    def put(self, slot: int, b: torch.Tensor, basis: int) -> None:
        """Makes `b` (D, r), r <= R, the B of `slot`, on the block `basis` of s."""
        self.pool[slot].zero_()
        self.pool[slot, : b.shape[1]] = b.T.to(self.pool)
        self.basis_of[slot] = basis

    def clear(self, slot: int) -> None:
        """Makes the delta of `slot` zero."""
        self.pool[slot].zero_()

    @property
    def num_bytes(self) -> int:
        """What the operands hold, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.pool, self.basis_of))
