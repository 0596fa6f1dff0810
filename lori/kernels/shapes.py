"""What is wrong with the arrays of a step."""

import torch

from lori.kernels.operands import Operands
from lori.kernels.route import Route


def mismatch(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route) -> ValueError:
    """Returns the error that says what y and s are, and what the operands and the route make expected."""
    layout, num_tokens = operands.layout, route.num_tokens
    return ValueError(
        f"y is {tuple(y.shape)} {y.dtype} with strides {y.stride()} on {y.device}, s {tuple(s.shape)} {s.dtype} with strides "
        f"{s.stride()} on {s.device}; expected ({num_tokens}, {layout.num_outputs}) and ({num_tokens}, {operands.num_bases} "
        f"or more, {layout.rank}), both {layout.dtype} on {operands.pool.device}, rows contiguous"
    )
