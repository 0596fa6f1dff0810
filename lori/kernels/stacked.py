"""`add_delta` as one matrix product in torch: the dense B of the step's slots stacked, and s repeated with each slot's weight.

[w_1 s | w_2 s | …] (T, U R) times [B_1; B_2; …] (U R, D). The cost grows with the number of different adapters in a step, and
every B is kept dense. For machines on which the `cpu` kernel could not be built.
"""

import torch

from lori.kernels.operands import Operands
from lori.kernels.route import Route


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route) -> None:
    """y[t] += sum over the terms of weight * B_slot s[t]; shapes as in `lori.kernels.add_delta`."""
    slots, weights = route.weight_matrix
    weighted = (s[:, operands.basis_of.long()[slots]] * weights[:, :, None]).to(s.dtype)  # (T, U, R), rounded once
    num_slots, _, num_outputs = operands.dense.shape
    b = operands.dense if len(slots) == num_slots else operands.dense[slots]  # slots ascend, so all slots need no copy
    y.addmm_(weighted.flatten(1), b.view(-1, num_outputs))
