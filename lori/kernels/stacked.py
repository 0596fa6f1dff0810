"""`add_delta` as one matrix product: the B of the step's slots stacked, s repeated for each slot with its weight.

[w_1 s | w_2 s | …] (T, U R) times [B_1; B_2; …] (U R, D). One product whatever the mixture; its cost grows with the number of
different adapters in a step.
"""

import torch

from lori.kernels.operands import Operands, Route


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route) -> None:
    """y[t] += sum over the terms of weight * B_slot s[t]; shapes as in `lori.kernels.add_delta`."""
    weighted = (s[:, operands.basis_of[route.slots]] * route.weights[:, :, None]).to(s.dtype)  # (T, U, R), rounded once
    num_slots, _, num_outputs = operands.pool.shape
    b = operands.pool if len(route.slots) == num_slots else operands.pool[route.slots]  # sorted: all of them is the pool
    y.addmm_(weighted.flatten(1), b.view(-1, num_outputs))
