"""Checks of a step's arrays against the operands and the route."""

import torch

from lori.kernels.operands import Operands
from lori.kernels.route import Route


def fits(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route) -> bool:
    """Return whether y (T, D) and s (T, A, R) match the operands and the route. Rows must be contiguous and must not overlap."""
    layout = operands.layout
    if y.dim() != 2 or s.dim() != 3:
        return False
    num_tokens, num_outputs = y.shape
    s_tokens, num_bases, rank = s.shape
    return (
        y.dtype is layout.dtype
        and s.dtype is layout.dtype
        and y.device == s.device == operands.pool.device == route.segments.device
        and num_outputs == layout.num_outputs
        and rank == layout.rank
        and num_bases >= operands.num_bases
        and s_tokens == num_tokens == route.num_tokens
        and route.weights.dim() == 1
        and (y.stride(0) >= num_outputs or num_tokens <= 1)
        and (y.stride(1) == 1 or num_outputs == 1)
        and (s.stride(2) == 1 or rank == 1)
        and (s.stride(1) == rank or num_bases == 1)
    )


def mismatch(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route) -> ValueError:
    """Return the error for y and s that do not match, with actual and expected shapes, dtypes and devices."""
    layout, num_tokens = operands.layout, route.num_tokens
    return ValueError(
        f"y is {tuple(y.shape)} {y.dtype} with strides {y.stride()} on {y.device}, s {tuple(s.shape)} {s.dtype} with strides "
        f"{s.stride()} on {s.device}; expected ({num_tokens}, {layout.num_outputs}) and ({num_tokens}, {operands.num_bases} "
        f"or more, {layout.rank}), both {layout.dtype} on {operands.pool.device}, rows contiguous, and the route of one layer"
    )
