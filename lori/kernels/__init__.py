"""The batched delta of LoRI: `add_delta`, and the operands and routes it works on.

Semantics, for each token t of a step:

    y[t] += sum over the terms (start <= t < stop) of weight * B_slot s[t]

accumulated in fp32, written in y's dtype; `stacked` rounds weight * s to that dtype first. y: (T, D), changed in place, rows may
be strided. s: (T, A, R), A x of each basis, in y's dtype. T tokens, D outputs, A bases, R rank.
"""

import torch

from lori.kernels import reference, stacked
from lori.kernels.operands import Operands, Route, Term

KERNELS = {"reference": reference.add_delta, "stacked": stacked.add_delta}


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route, kernel: str = "stacked") -> None:
    """Adds the step's deltas to y in place, see the module. Raises `ValueError` where `kernel` is not there."""
    if kernel not in KERNELS:
        raise ValueError(f"there is no kernel {kernel!r}, expected one of {sorted(KERNELS)}")
    KERNELS[kernel](y, s, operands, route)


__all__ = ["KERNELS", "Operands", "Route", "Term", "add_delta"]
