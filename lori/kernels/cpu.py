"""`add_delta` in C++ (`native/`): one window of one token is an item, and the items are divided between torch's threads.

A window's sums stay in registers (AVX-512), and s is looked up by a permutation of registers up to rank 64 in bf16, 32 in fp32.
Called past torch's dispatcher, which would take as long as the kernel itself.
"""

from math import inf
from typing import Any

import torch

from lori.kernels.layout import LANES
from lori.kernels.native import MISSING, MODULE, choose
from lori.kernels.operands import Operands
from lori.kernels.route import Route
from lori.kernels.shapes import mismatch

PACKED_NS = {"avx512_bf16": (1.85, 0.0055), "avx512": (2.5, 0.0081)}
"""What a token takes for each slice of 16 rows and for each byte of a slot, in ns on one core (`tests/bench/crossover.py`)."""
PRODUCT_NS = {torch.bfloat16: 0.005, torch.float32: 0.0175}
"""What a token takes for each entry of the dense B in torch's product, where there is AVX-512."""
UNPACK_NS, PRODUCT_START_NS = 0.6, 12_000.0
"""What unpacking takes for each entry of B, on one core whatever the threads, and what a product takes before its first token."""


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route, instruction_set: str | None = None) -> None:
    """y[t] += sum over the terms of weight * B_slot s[t]; shapes as in `lori.kernels.add_delta`.

    bf16 below 2**-126 counts as zero where the processor has bf16 instructions. No gradient passes. `instruction_set` is one of
    `instruction_sets()`, the fastest by default. Raises `ValueError` where shapes, strides or
    dtypes are not those of the operands and the route, `RuntimeError` where the kernel is not installed.
    """
    dtype = operands.layout.dtype
    if not (y.dtype is s.dtype is dtype and y.is_cpu and s.is_cpu and operands.is_cpu):
        raise mismatch(y, s, operands, route)
    bound = bound_operands(operands) if instruction_set is None else bind(operands, instruction_set)
    dense = dense_segments(operands, route) if route.runs and instruction_set is None else ()
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
    """Return the numbers of the segments for which a product with the dense B is faster.

    None of several terms is among them: each product would be rounded by itself.
    """
    return tuple(i for i, num_tokens, slot in route.runs if num_tokens > packed_tokens(operands, slot))


def packed_tokens(operands: Operands, slot: int) -> float:
    """Return the tokens of a segment of one term up to which the packed B of `slot` takes less time than to unpack it and one
    matrix product; remembered until the slot changes."""
    found = operands.packed_tokens.get(slot)
    if found is None:
        found = operands.packed_tokens[slot] = _crossover(operands, operands.num_slot_bytes(slot))
    return found


def _crossover(operands: Operands, num_bytes: int) -> float:
    if not num_bytes or choose() not in PACKED_NS:  # torch's product has not been measured on others
        return inf
    per_slice, per_byte = PACKED_NS[choose()]
    num_outputs, rank, dtype = operands.layout.num_outputs, operands.layout.rank, operands.layout.dtype
    packed = per_slice * num_outputs / LANES + per_byte * num_bytes  # a token
    gained = (packed - PRODUCT_NS[dtype] * num_outputs * rank) / torch.get_num_threads()
    return (PRODUCT_START_NS + UNPACK_NS * num_outputs * rank) / gained if gained > 0 else inf


def unpack(operands: Operands, slot: int) -> torch.Tensor:
    """Return the dense B of a slot, (D, R) of the operands' dtype."""
    layout = operands.layout
    b = torch.empty(layout.num_outputs, layout.rank, dtype=layout.dtype)
    bound_operands(operands).unpack(slot, b.data_ptr())
    return b


def bound_operands(operands: Operands) -> Any:
    """Return the module's view of operands, made again when their pool has moved."""
    if operands.bound is None:
        operands.bound = bind(operands)
    return operands.bound


def bound_route(route: Route) -> Any:
    """Return the module's view of a route on the CPU, made once."""
    if route.cpu is None:
        arrays = (route.segments.numpy(), route.slots.numpy(), route.weights.numpy())
        route.cpu = module().Route(*arrays, route.num_tokens)
    return route.cpu


def bind(operands: Operands, instruction_set: str | None = None) -> Any:
    """Return the module's view of operands, valid until their pool moves.

    `instruction_set` is one of `instruction_sets()`, the fastest by default; raises `ValueError` for another.
    """
    of = module().Operands
    layout, arrays = operands.layout, (operands.pool.numpy(), operands.starts.numpy(), operands.basis_of.numpy())
    return of(*arrays, layout.num_outputs, layout.rank, layout.dtype_name, choose(instruction_set))


def module() -> Any:
    """Return the compiled module. Raises `RuntimeError` where it is not installed."""
    if MODULE is None:
        raise RuntimeError(MISSING)
    return MODULE
