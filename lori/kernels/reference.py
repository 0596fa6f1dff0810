"""`add_delta` as a loop over terms in fp32, to be checked by eye."""

import torch

from lori.kernels.operands import Operands, Route


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route) -> None:
    """y[t] += sum over the terms of weight * B_slot s[t]; shapes as in `lori.kernels.add_delta`."""
    total = y.float()
    for term in route.terms:
        span = slice(term.start, term.stop)
        b = operands.pool[term.slot].float()  # (R, D)
        total[span] += term.weight * s[span, operands.basis_of[term.slot]].float() @ b
    y.copy_(total)
