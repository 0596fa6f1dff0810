"""Reference `add_delta`: a loop over segments and their terms in fp32, simple enough to check by eye."""

import torch

from lori.kernels.operands import Operands
from lori.kernels.route import Route


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route) -> None:
    """y[t] += sum over the terms of weight * B_slot s[t]; shapes as in `lori.kernels.add_delta`."""
    total = y.float()
    for start, stop, terms in route.spans:
        for slot, weight in terms:
            b = operands.dense[slot].float()  # (R, D)
            total[start:stop] += weight * s[start:stop, operands.basis_of[slot]].float() @ b
    y.copy_(total)
