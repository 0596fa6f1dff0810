"""`add_delta` in C++ (`native/`): a work item is one window of one token, and the items are divided between torch's threads.

A window's sums stay in registers (AVX-512). Up to rank 64 in bf16 and 32 in fp32, s is looked up by register permutes.
The kernel is called without torch's dispatcher, whose overhead is as long as the kernel itself.
"""

from math import inf
from typing import TYPE_CHECKING

import torch

from lori.kernels.layout import LANES
from lori.kernels.native import MISSING, MODULE, choose
from lori.kernels.operands import Operands
from lori.kernels.route import Route
from lori.kernels.shapes import mismatch

if TYPE_CHECKING:
    import _lori_cpu

PACKED_NS = {"amx": (1.85, 0.0055), "avx512_bf16": (1.85, 0.0055), "avx512": (2.5, 0.0081)}
"""Time of the packed kernel for each token: ns per slice of 16 rows, and ns per byte of a slot. On one core, measured by
`tests/bench/crossover.py`."""
PRODUCT_NS = {torch.bfloat16: 0.005, torch.float32: 0.0175}
"""Time of torch's product for each token: ns per entry of the dense B, with AVX-512."""
UNPACK_NS, PRODUCT_START_NS = 0.6, 12_000.0
"""Time to unpack B: ns per entry, on one core for any number of threads. And fixed time of a product, in ns."""


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route, instruction_set: str | None = None) -> None:
    """y[t] += sum over the terms of weight * B_slot s[t]; shapes as in `lori.kernels.add_delta`.

    With the processor's bf16 instructions, bf16 values below 2**-126 count as zero. Not differentiable. `instruction_set` is one
    of `instruction_sets()`, the fastest by default. Raises `ValueError` if shapes, strides or dtypes do not match the operands
    and the route, `RuntimeError` if the kernel is not installed.
    """
    dtype = operands.layout.dtype
    if not (y.dtype is s.dtype is dtype and y.is_cpu and s.is_cpu and operands.is_cpu):
        raise mismatch(y, s, operands, route)
    bound = bound_operands(operands) if instruction_set is None else bind(operands, instruction_set)
    dense = dense_segments(operands, route) if route.long_segments and instruction_set is None else ()
    packed = route.without(dense) if dense else route
    num_threads = torch.get_num_threads()
    if not bound.add_delta(
        bound_route(packed), y.data_ptr(), y.shape, y.stride(), s.data_ptr(), s.shape, s.stride(), num_threads
    ):
        raise mismatch(y, s, operands, route)
    for i in dense:
        start, stop, ((slot, weight),) = route.spans[i]
        y[start:stop].addmm_(s[start:stop, operands.basis_of[slot]], unpack(operands, slot).T, alpha=weight)


def dense_segments(operands: Operands, route: Route) -> tuple[int, ...]:
    """Return the indices of the segments for which a product with the dense B is faster.

    Leaves out segments with several terms, since each product would be rounded separately.
    """
    return tuple(i for i, num_tokens, slot in route.long_segments if num_tokens > max_packed_tokens(operands, slot))


def max_packed_tokens(operands: Operands, slot: int) -> float:
    """Return the longest segment, in tokens, for which the packed kernel is faster than unpacking `slot` and one matrix product.

    For segments of one term. Cached until the slot changes.
    """
    num_tokens = operands.max_packed_tokens.get(slot)
    if num_tokens is None:
        num_tokens = operands.max_packed_tokens[slot] = _crossover(operands, operands.num_slot_bytes(slot))
    return num_tokens


def _crossover(operands: Operands, num_bytes: int) -> float:
    if not num_bytes or choose() not in PACKED_NS:  # torch's product was not measured with other instruction sets
        return inf
    per_slice, per_byte = PACKED_NS[choose()]
    num_outputs, rank, dtype = operands.layout.num_outputs, operands.layout.rank, operands.layout.dtype
    packed = per_slice * num_outputs / LANES + per_byte * num_bytes  # ns per token
    gain = (packed - PRODUCT_NS[dtype] * num_outputs * rank) / torch.get_num_threads()  # ns per token
    return (PRODUCT_START_NS + UNPACK_NS * num_outputs * rank) / gain if gain > 0 else inf


def unpack(operands: Operands, slot: int) -> torch.Tensor:
    """Return the dense B of a slot, (D, R), in the operands' dtype."""
    layout = operands.layout
    b = torch.empty(layout.num_outputs, layout.rank, dtype=layout.dtype)
    bound_operands(operands).unpack(slot, b.data_ptr())
    return b


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
