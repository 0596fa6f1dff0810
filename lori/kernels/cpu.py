"""`add_delta` in C++ (`native/`): a work item is one window of one token, and the items are divided between torch's threads.

A window's sums stay in registers (AVX-512). Up to rank 64 in bf16 and 32 in fp32, s is looked up by register permutes.
The kernel is called without torch's dispatcher, whose overhead is as long as the kernel itself.
"""

from typing import TYPE_CHECKING

import torch

from lori.kernels.operands import Operands
from lori.kernels.route import Route
from lori.kernels.shapes import mismatch
from lori.native import MISSING, MODULE, choose

if TYPE_CHECKING:
    import _lori_cpu


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route, instruction_set: str | None = None) -> None:
    """y[t] += sum over the terms of weight * B_slot s[t]; shapes as in `lori.kernels.add_delta`.

    With the processor's bf16 instructions, bf16 values below 2**-126 count as zero. Not differentiable. `instruction_set` is one
    of `instruction_sets()`, the fastest by default. Raises `ValueError` if shapes, strides or dtypes do not match the operands
    and the route, `RuntimeError` if the kernel is not installed.
    """
    dtype = operands.layout.dtype
    if not (y.dtype is s.dtype is dtype and y.is_cpu and s.is_cpu and operands.is_cpu and route.weights.dim() == 1):
        raise mismatch(y, s, operands, route)
    bound = bound_operands(operands) if instruction_set is None else bind(operands, instruction_set)
    num_threads = torch.get_num_threads()
    if not bound.add_delta(bound_route(route), y.data_ptr(), y.shape, y.stride(), s.data_ptr(), s.shape, s.stride(), num_threads):
        raise mismatch(y, s, operands, route)


def bound_operands(operands: Operands) -> "_lori_cpu.Operands":
    """Return the C++ view of operands. Made again after their pool has moved."""
    if operands.bound is None:
        operands.bound = bind(operands)
    return operands.bound


def bound_route(route: Route) -> "_lori_cpu.Route":
    """Return the C++ view of a route on the CPU. Made once."""
    if route.cpu is None:
        _require_module()
        route.cpu = MODULE.Route(route.segments.numpy(), route.slots.numpy(), route.weights.numpy(), route.num_tokens)
    return route.cpu


def bind(operands: Operands, instruction_set: str | None = None) -> "_lori_cpu.Operands":
    """Return a C++ view of operands, valid until their pool moves.

    `instruction_set` is one of `instruction_sets()`, the fastest by default. Raises `ValueError` for another one.
    """
    _require_module()
    layout, arrays = operands.layout, (operands.pool.numpy(), operands.starts.numpy(), operands.basis_of.numpy())
    return MODULE.Operands(*arrays, layout.num_outputs, layout.rank, layout.dtype_name, choose(instruction_set))


def _require_module() -> None:
    """Raise `RuntimeError` if the compiled module is not installed."""
    if not MODULE:
        raise RuntimeError(MISSING)
