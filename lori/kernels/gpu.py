"""`add_delta` in Triton: a gather for tokens in short segments, a matrix product for long segments.

*Gather*: a program is one window of one token. The 256 positions of the window walk down their slices in parallel, so that the
bytes of a step are read together. Then each row takes the sum at its position, found by its place.
*Dense*: a program is 64 tokens of one segment and some rows of a window. It expands these rows of B in registers, by comparing
the column of each entry with every column, and multiplies. The expansion costs two instructions per column, the gather some seven
per token, so the dense form pays from about a third as many tokens as the rank.

Launches go to the current stream of the current device without a synchronization. The one exception is the plan of a route that
was not made by `Route.from_terms`. The gather's grid depends on shapes only, so a step can be captured in a CUDA graph. A capture
with a new `Route` uses the gather for all tokens, and a replay reads the current content of the route's arrays. `Route.by_token`
gives every token a segment for any terms. The pool must not move between capture and replay (`Operands.num_moves`).

Prefixes: p_ pointer, i_ index, o_ offsets, m_ mask, b_ values of a block. Shapes: T tokens, A bases, R rank, D outputs,
W windows, N programs along the tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lori.device import to_device
from lori.kernels.layout import HEADER, LANES, SLICES, UNIT, WINDOW, Layout
from lori.kernels.operands import Operands
from lori.kernels.route import Route
from lori.kernels.shapes import fits, mismatch

DENSE_TOKENS = 32
"""Lowest number of tokens in a segment for the dense form: half a tile. By instruction count, 11 tokens pay at rank 32."""
DENSE_RANK = 64
"""Highest rank for the dense form. By the same count, some 20 tokens pay at this rank."""
TILE = 64
"""Tokens of a tile: the rows of one matrix instruction on Hopper."""
UNROLL = tl.constexpr(4)
"""Number of steps of a slice whose loads are in flight together. At rank 32 and density 0.1 a row has three entries on average,
the longest nine."""
GATHER_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
DENSE_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
"""Triton's compile options for each form. The gather's 4 warps give each thread two rows."""

_LANES, _SLICES, _UNIT, _WINDOW, _HEADER = (tl.constexpr(size) for size in (LANES, SLICES, UNIT, WINDOW, HEADER))


@dataclass(frozen=True, slots=True)
class Plan:
    """Work list of the kernels for one route.

    `tokens` (T, 3) int32 holds each token with the `first` and `last` of its terms; both are equal for a token without terms.
    `tiles` (N, 4) int32 holds `start, stop, first, last` for each tile of the long segments. `gather_tokens` (N, 3) int32 holds
    the rows of `tokens` that are in no tile.
    """

    tokens: torch.Tensor
    tiles: torch.Tensor
    gather_tokens: torch.Tensor


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route, dense_tokens: int | None = None) -> None:
    """y[t] += sum over the terms of weight * B_slot s[t]; shapes as in `lori.kernels.add_delta`.

    Up to rank `DENSE_RANK`, segments of at least `dense_tokens` tokens (by default `DENSE_TOKENS`) are multiplied with a dense B.
    Raises `ValueError` if shapes, strides, dtypes or devices do not match the operands and the route.
    """
    if not fits(y, s, operands, route):
        raise mismatch(y, s, operands, route)
    if not len(route.segments):
        return
    plan = route.gpu.get("plan") if dense_tokens is None else make_plan(route, dense_tokens)
    if not isinstance(plan, Plan):
        plan = route.gpu["plan"] = make_plan(route)
    layout = operands.layout
    arrays = (operands.pool, operands.starts, operands.basis_of, route.slots, route.weights)
    shapes = (y.stride(0), s.stride(0), layout.num_outputs, layout.rank, layout.step_bytes)
    tokens = plan.tokens
    if layout.rank <= DENSE_RANK and len(plan.tiles):
        width, rows = dense_sizes(layout)
        grid = (len(plan.tiles), triton.cdiv(layout.num_outputs, rows))
        dense[grid](y, s, *arrays, plan.tiles, *shapes, width, rows, TILE, **DENSE_OPTIONS)
        tokens = plan.gather_tokens
    if len(tokens):
        gather[len(tokens), layout.num_windows](y, s, *arrays, tokens, *shapes, **GATHER_OPTIONS)


def make_plan(route: Route, dense_tokens: int = DENSE_TOKENS) -> Plan:
    """Return the plan of a route: tiles for segments of at least `dense_tokens` tokens, the gather for all other tokens.

    To find such segments it reads `Route.segment_list`, for which the CPU may wait for the device. It reads nothing, and all
    tokens take the gather, if the route is one of `Route.by_token`, if it has fewer than `dense_tokens` tokens, or while a CUDA
    graph is being captured.
    """
    device = route.segments.device
    if route.is_by_token:
        by_token = torch.stack([route.segments[:, column] for column in (0, 2, 3)], 1)
        return Plan(by_token, route.segments[:0], by_token)
    tokens = _with_terms(route, torch.arange(route.num_tokens, dtype=torch.int32, device=device))
    if route.num_tokens < dense_tokens or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return Plan(tokens, route.segments[:0], tokens)
    tiles: list[tuple[int, int, int, int]] = []
    in_no_tile: list[int] = []
    for start, stop, first, last in route.segment_list:
        if stop - start < dense_tokens:
            in_no_tile += range(start, stop)
        else:
            tiles += ((tile, min(tile + TILE, stop), first, last) for tile in range(start, stop, TILE))
    gather_tokens = _with_terms(route, to_device(torch.tensor(in_no_tile, dtype=torch.int32), device))
    return Plan(tokens, to_device(torch.tensor(tiles, dtype=torch.int32).view(-1, 4), device), gather_tokens)


def dense_sizes(layout: Layout) -> tuple[int, int]:
    """Return the size of the tile of B that a program of `dense` expands: its number of columns, and of rows.

    The columns are all R of them, padded to a power of two. Both numbers are powers of two and at least 16, as `tl.dot` requires.
    Chosen so that a thread needs at most 128 registers and spills none, as compiled for ranks 32, 64 and 128 by Triton 3.9 for
    sm_80 and sm_90.
    """
    width = max(16, int(triton.next_power_of_2(layout.rank)))
    return width, 32 if layout.dtype is torch.float32 else min(128, 4096 // width)


def _with_terms(route: Route, tokens: torch.Tensor) -> torch.Tensor:
    """Return (N, 3) int32: each of `tokens` with the first and last of its terms. Does not wait for the device."""
    starts = route.segments[:, 0].contiguous()
    segment = torch.searchsorted(starts, tokens, right=True) - 1
    _, stop, first, last = route.segments[segment.clamp(min=0)].unbind(1)
    inside = (segment >= 0) & (tokens < stop)
    return torch.stack((tokens, first * inside, last * inside), dim=1)


@triton.jit
def gather(
    p_y: tl.tensor,
    p_s: tl.tensor,
    p_pool: tl.tensor,
    p_starts: tl.tensor,
    p_basis_of: tl.tensor,
    p_slots: tl.tensor,
    p_weights: tl.tensor,
    p_tokens: tl.tensor,
    y_stride: tl.tensor,
    s_stride: tl.tensor,
    num_outputs: tl.constexpr,
    rank: tl.constexpr,
    step_bytes: tl.constexpr,
) -> None:
    """Semantics: y[t, window] += sum over first <= m < last of weights[m] * B_slots[m] s[t, basis_of[slots[m]]]; grid (N, W).

    y: (T, D). s: (T, A, R). pool, starts, basis_of: of `Operands`. slots, weights: of `Route`. tokens: (N, 3) of `Plan`.
    """
    i_n, i_w = tl.program_id(0), tl.program_id(1)
    i_t = tl.load(p_tokens + 3 * i_n).to(tl.int64)
    first, last = tl.load(p_tokens + 3 * i_n + 1), tl.load(p_tokens + 3 * i_n + 2)
    b_total = tl.zeros((_WINDOW,), tl.float32)
    has_any = False
    for i_m in range(first, last):
        slot = tl.load(p_slots + i_m).to(tl.int64)
        start = tl.load(p_starts + slot * tl.cdiv(num_outputs, _WINDOW) + i_w)
        if start >= 0:
            p_block = p_pool + start.to(tl.int64) * _UNIT
            p_s_t = p_s + i_t * s_stride + tl.load(p_basis_of + slot) * rank
            num_rows = num_outputs - i_w * _WINDOW
            b_total += tl.load(p_weights + i_m) * _window_times_s(p_block, p_s_t, num_rows, rank, step_bytes)
            has_any = True
    if has_any:
        o_d = i_w * _WINDOW + tl.arange(0, _WINDOW)
        p_out = p_y + i_t * y_stride + o_d
        b_y = tl.load(p_out, mask=o_d < num_outputs).to(tl.float32) + b_total
        tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=o_d < num_outputs)


@triton.jit
def dense(
    p_y: tl.tensor,
    p_s: tl.tensor,
    p_pool: tl.tensor,
    p_starts: tl.tensor,
    p_basis_of: tl.tensor,
    p_slots: tl.tensor,
    p_weights: tl.tensor,
    p_tiles: tl.tensor,
    y_stride: tl.tensor,
    s_stride: tl.tensor,
    num_outputs: tl.constexpr,
    rank: tl.constexpr,
    step_bytes: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    tokens: tl.constexpr,
) -> None:
    """Semantics: as `gather`, for the tokens start <= t < stop and `rows` rows of B; grid (N, D / rows).

    tiles: (N, 4) of `Plan`, with stop - start <= tokens. `rows` divides 256. `width`: R rounded up to a size for `tl.dot`.
    """
    i_n, i_d = tl.program_id(0), tl.program_id(1)
    i_w = i_d * rows // _WINDOW
    start, stop = tl.load(p_tiles + 4 * i_n), tl.load(p_tiles + 4 * i_n + 1)
    first, last = tl.load(p_tiles + 4 * i_n + 2), tl.load(p_tiles + 4 * i_n + 3)
    o_t, o_r, o_d = start + tl.arange(0, tokens), tl.arange(0, width), i_d * rows + tl.arange(0, rows)
    m_t, m_d = (o_t < stop)[:, None], o_d < num_outputs
    b_total = tl.zeros((tokens, rows), tl.float32)
    has_any = False
    for i_m in range(first, last):
        slot = tl.load(p_slots + i_m).to(tl.int64)
        place = tl.load(p_starts + slot * tl.cdiv(num_outputs, _WINDOW) + i_w)
        if place >= 0:
            p_block = p_pool + place.to(tl.int64) * _UNIT
            b_b = _dense_rows(p_block, o_d % _WINDOW, m_d, rank, step_bytes, width, p_y.dtype.element_ty)
            p_s_t = p_s + o_t.to(tl.int64)[:, None] * s_stride + tl.load(p_basis_of + slot) * rank + o_r[None, :]
            b_s = tl.load(p_s_t, mask=m_t & (o_r < rank)[None, :], other=0.0)
            b_total += tl.load(p_weights + i_m) * tl.dot(b_s, b_b, input_precision="ieee")
            has_any = True
    if has_any:
        p_out = p_y + o_t.to(tl.int64)[:, None] * y_stride + o_d[None, :]
        m_out = m_t & m_d[None, :]
        b_y = tl.load(p_out, mask=m_out).to(tl.float32) + b_total
        tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_out)


@triton.jit
def _window_times_s(
    p_block: tl.tensor,
    p_s: tl.tensor,
    num_rows: tl.tensor,
    rank: tl.constexpr,
    step_bytes: tl.constexpr,
) -> tl.tensor:
    # Returns one window of B times s, (256,) fp32, in the order of the rows.
    o_p = tl.arange(0, _WINDOW)
    lane = o_p % _LANES
    begin, num_steps = _steps(p_block, o_p // _LANES)
    position = _position(p_block, o_p, o_p < num_rows, step_bytes)
    max_steps = tl.load(p_block.to(tl.pointer_type(tl.uint16))).to(tl.int32)  # the first slice is the longest
    b_sum = tl.zeros((_WINDOW,), tl.float32)
    if p_s.dtype.element_ty == tl.bfloat16:
        bits: tl.constexpr = 8 if rank <= 256 else 16
        for i_first in range(0, max_steps // 2, UNROLL):
            for i_next in tl.static_range(UNROLL):
                i_pair = i_first + i_next
                m_pair = i_pair < num_steps // 2
                p_pair = p_block + _HEADER + (begin + 2 * i_pair) * step_bytes
                p_columns = (p_pair + 4 * _LANES).to(tl.pointer_type(tl.uint16 if rank <= 256 else tl.uint32))
                values = tl.load(p_pair.to(tl.pointer_type(tl.uint32)) + lane, mask=m_pair, other=0)
                columns = tl.load(p_columns + lane, mask=m_pair, other=0).to(tl.uint32)
                b_even = tl.load(p_s + (columns & ((1 << bits) - 1)), mask=m_pair, other=0.0).to(tl.float32)
                b_odd = tl.load(p_s + (columns >> bits), mask=m_pair, other=0.0).to(tl.float32)
                b_sum += (values << 16).to(tl.float32, bitcast=True) * b_even
                b_sum += (values & 0xFFFF0000).to(tl.float32, bitcast=True) * b_odd
        m_last = num_steps % 2 == 1
        value, column = _entries(p_block, begin, num_steps, lane, num_steps - 1, m_last, rank, step_bytes, tl.bfloat16)
        b_sum += value.to(tl.float32) * tl.load(p_s + column, mask=m_last, other=0.0).to(tl.float32)
    else:
        for i_first in range(0, max_steps, UNROLL):
            for i_next in tl.static_range(UNROLL):
                i_k = i_first + i_next
                m_entry = i_k < num_steps
                value, column = _entries(p_block, begin, num_steps, lane, i_k, m_entry, rank, step_bytes, tl.float32)
                b_sum += value * tl.load(p_s + column, mask=m_entry, other=0.0)
    return tl.gather(b_sum, position, 0)


@triton.jit
def _dense_rows(
    p_block: tl.tensor,
    o_row: tl.tensor,
    m_row: tl.tensor,
    rank: tl.constexpr,
    step_bytes: tl.constexpr,
    width: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    # Returns the given rows of a window as a dense matrix, transposed: (width, rows).
    position = _position(p_block, o_row, m_row, step_bytes)
    lane = position % _LANES
    begin, num_steps = _steps(p_block, position // _LANES)
    b_b = tl.zeros((width, o_row.shape[0]), dtype)
    for i_k in range(tl.max(tl.where(m_row, num_steps, 0))):
        m_entry = m_row & (i_k < num_steps)
        value, column = _entries(p_block, begin, num_steps, lane, i_k, m_entry, rank, step_bytes, dtype)
        column = tl.where(value == 0.0, -1, column)  # padding has column 0 and must not overwrite that column's entry
        b_b = tl.where(column[None, :] == tl.arange(0, width)[:, None], value[None, :], b_b)
    return b_b


@triton.jit
def _entries(
    p_block: tl.tensor,
    begin: tl.tensor,
    num_steps: tl.tensor,
    lane: tl.tensor,
    i_k: tl.tensor,
    m_entry: tl.tensor,
    rank: tl.constexpr,
    step_bytes: tl.constexpr,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    # Returns value and column of entry i_k in each of the given lanes. The slice of a lane begins at step `begin`.
    per_lane: tl.constexpr = 2 if dtype == tl.bfloat16 else 1
    is_together = i_k < num_steps // per_lane * per_lane
    together = tl.where(is_together, per_lane, 1)
    p_steps = p_block + _HEADER + (begin + tl.where(is_together, i_k // per_lane * per_lane, i_k)) * step_bytes
    p_columns = (p_steps + together * (_LANES * 4 // per_lane)).to(tl.pointer_type(tl.uint8 if rank <= 256 else tl.uint16))
    o_entry = together * lane + tl.where(is_together, i_k % per_lane, 0)
    value = tl.load(p_steps.to(tl.pointer_type(dtype)) + o_entry, mask=m_entry, other=0.0)
    return value, tl.load(p_columns + o_entry, mask=m_entry, other=0).to(tl.int32)


@triton.jit
def _steps(p_block: tl.tensor, i_slice: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    # Returns the first step and the number of steps of each of the given slices.
    p_ends = p_block.to(tl.pointer_type(tl.uint16))
    begin = tl.load(p_ends + i_slice - 1, mask=i_slice > 0, other=0).to(tl.int32)
    return begin, tl.load(p_ends + i_slice).to(tl.int32) - begin


@triton.jit
def _position(p_block: tl.tensor, o_row: tl.tensor, m_row: tl.tensor, step_bytes: tl.constexpr) -> tl.tensor:
    # Returns the position of each of the given rows of a window: the inverse of `lori.kernels.layout.place_of`.
    num_steps = tl.load(p_block.to(tl.pointer_type(tl.uint16)) + _SLICES - 1).to(tl.int32)
    place = tl.load(p_block + _HEADER + num_steps * step_bytes + o_row, mask=m_row, other=0).to(tl.int32)
    return place // 32 * 32 + place % 2 * 16 + place % 32 // 2
