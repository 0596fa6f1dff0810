"""`add_delta` as one matrix product: the dense B of the step's slots stacked, s repeated for each slot with its weight.

[w_1 s | w_2 s | …] (T, U R) times [B_1; B_2; …] (U R, D): all that torch alone can do. Its cost grows with the number of
different adapters in a step, and it keeps every B dense. For machines where no compiler built the `cpu` kernel.
"""

import torch

from lori.kernels.operands import Operands
from lori.kernels.route import Route


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route) -> None:
    """y[t] += sum over the terms of weight * B_slot s[t]; shapes as in `lori.kernels.add_delta`."""
    slots, weights = route.matrix
    weighted = (s[:, operands.basis_of.long()[slots]] * weights[:, :, None]).to(s.dtype)  # (T, U, R), rounded once
    num_slots, _, num_outputs = operands.dense.shape
    b = operands.dense if len(slots) == num_slots else operands.dense[slots]  # ascending: all of them is the pool
    y.addmm_(weighted.flatten(1), b.view(-1, num_outputs))
