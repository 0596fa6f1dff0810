"""A layer's operations on a GPU: those of `torch_ops`, with decoding attention in Triton. Nothing waits for the device.

One program computes some keys of one sequence with the queries of one key-value head, so each key is read once for all of these
queries. If there are too few sequences and heads to fill the device, each sequence's keys are split over several programs, and a
second kernel joins the parts (flash decoding). Grids depend on shapes only, so a step can be captured and replayed with other
arrays.

Prefixes: p_ pointer, i_ index, o_ offsets, m_ mask, b_ values of a block. Shapes: T tokens of a step, B sequences that decode, H
heads, G key-value heads, E head size, P tokens in memory, S splits, K keys of a program's iteration, L keys of a chunk, N blocks.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from lori.device import to_device
from server.engine.model.cuda_graphs import DecodeKeys
from server.engine.model.decoder import Heads, Span
from server.engine.model.torch_ops import ChunkKeys, Step, TorchOps

PROGRAMS, MAX_SPLITS = 256, 16
"""Approximate number of programs that fills a device, and maximum number of splits of a sequence's keys."""
KEYS = 64
"""K: keys that a program computes at a time."""
OPTIONS = {"num_warps": 4}


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decode_keys: DecodeKeys, heads: Heads, block_size: int
) -> torch.Tensor:
    """Return softmax(scale * query keys^T) values (B, H, E), summed in fp32, for query (B, H, E), keys and values (P, G, E).

    All are contiguous and of one dtype. Only keys within `heads.window` count; scores are capped by `heads.softcap`.
    """
    assert query.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    num_rows, num_heads, size = query.shape
    group, num_splits = num_heads // heads.num_kv_heads, num_splits_for(num_rows * heads.num_kv_heads)
    out = torch.empty_like(query)
    shape = (num_rows, num_heads, num_splits)
    part = out if num_splits == 1 else torch.empty(*shape, size, dtype=torch.float32, device=query.device)
    weight = torch.empty(shape, dtype=torch.float32, device=query.device)
    head_arguments = (heads.scale, heads.softcap, heads.num_kv_heads, group, size, heads.window)
    tiles = (block_size, num_splits, max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(size)), KEYS)
    arrays = (decode_keys.table, decode_keys.starts, decode_keys.lengths)
    attend_split[num_rows, heads.num_kv_heads, num_splits](
        part, weight, query, keys, values, *arrays, *head_arguments, *tiles, **OPTIONS
    )
    if num_splits > 1:
        join[num_rows * num_heads,](out, part, weight, num_splits, size, tiles[3], **OPTIONS)
    return out


def num_splits_for(num_programs: int) -> int:
    """Return S, a power of two, for a number of sequences times key-value heads."""
    return int(min(MAX_SPLITS, triton.next_power_of_2(max(1, PROGRAMS // num_programs))))


@triton.jit
def attend_split(
    p_part: tl.tensor,
    p_weight: tl.tensor,
    p_query: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_table: tl.tensor,
    p_starts: tl.tensor,
    p_lengths: tl.tensor,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    window: tl.constexpr,
    block_size: tl.constexpr,
    num_splits: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    num_keys: tl.constexpr,
) -> None:
    """Semantics: part, weight = softmax over a split of the keys times these values, and log of the sum of exp; grid (B, G, S).

    part: (B, H, S, E). weight: (B, H, S) fp32. `rows` >= H/G and `width` >= E are sizes that a matrix product supports.
    """
    i_b, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, p_blocks = tl.load(p_lengths + i_b), p_table + tl.load(p_starts + i_b)
    first = tl.maximum(length - window, 0) if window > 0 else length * 0
    num_each = tl.cdiv(tl.cdiv(length - first, num_splits), num_keys) * num_keys
    begin = first + i_s * num_each
    end = tl.minimum(begin + num_each, length)
    o_h, o_e = tl.arange(0, rows), tl.arange(0, width)
    m_h, m_e = o_h < group, o_e < size
    i_head = (i_b * num_kv_heads + i_g) * group + o_h  # index over all rows
    b_query = tl.load(p_query + i_head[:, None] * size + o_e[None, :], mask=m_h[:, None] & m_e[None, :], other=0.0)
    b_most = tl.full((rows,), float("-inf"), tl.float32)
    b_sum = tl.zeros((rows,), tl.float32)
    b_out = tl.zeros((rows, width), tl.float32)
    for i_key in range(begin, end, num_keys):
        o_key = i_key + tl.arange(0, num_keys)
        m_key = o_key < end
        block = tl.load(p_blocks + o_key // block_size, mask=m_key, other=0).to(tl.int64)
        o_place = ((block * block_size + o_key % block_size) * num_kv_heads + i_g) * size
        b_keys = tl.load(p_keys + o_place[None, :] + o_e[:, None], mask=m_key[None, :] & m_e[:, None], other=0.0)
        b_scores = tl.dot(b_query, b_keys, input_precision="ieee") * scale
        if softcap > 0:
            b_tail = tl.exp(-2 / softcap * tl.abs(b_scores))
            b_scores = softcap * tl.where(b_scores < 0, b_tail - 1, 1 - b_tail) / (1 + b_tail)  # tanh
        b_scores = tl.where(m_key[None, :], b_scores, float("-inf"))
        b_next = tl.maximum(b_most, tl.max(b_scores, 1))
        b_kept, b_probable = tl.exp(b_most - b_next), tl.exp(b_scores - b_next[:, None])
        b_values = tl.load(p_values + o_place[:, None] + o_e[None, :], mask=m_key[:, None] & m_e[None, :], other=0.0)
        b_sum = b_sum * b_kept + tl.sum(b_probable, 1)
        b_out *= b_kept[:, None]
        b_out += tl.dot(b_probable.to(b_values.dtype), b_values, input_precision="ieee")
        b_most = b_next
    b_sum = tl.where(begin < end, b_sum, 1.0)  # a split may have no key: then its weight is exp of minus infinity
    o_part = (i_head * num_splits + i_s).to(tl.int64)
    p_out = p_part + o_part[:, None] * size + o_e[None, :]
    tl.store(p_out, (b_out / b_sum[:, None]).to(p_part.dtype.element_ty), mask=m_h[:, None] & m_e[None, :])
    tl.store(p_weight + o_part, b_most + tl.log(b_sum), mask=m_h)


@triton.jit
def join(
    p_out: tl.tensor,
    p_part: tl.tensor,
    p_weight: tl.tensor,
    num_splits: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """Semantics: out = sum over S of softmax(weight) * part, for one head of one sequence; grid (B H,)."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s, o_e = tl.arange(0, num_splits), tl.arange(0, width)
    b_weight = tl.load(p_weight + i_n * num_splits + o_s)
    b_share = tl.exp(b_weight - tl.max(b_weight, 0))
    p_parts = p_part + (i_n * num_splits + o_s)[:, None] * size + o_e[None, :]
    b_part = tl.load(p_parts, mask=(o_e < size)[None, :], other=0.0)
    b_out = tl.sum(b_part * b_share[:, None], 0) / tl.sum(b_share, 0)
    tl.store(p_out + i_n * size + o_e, b_out.to(p_out.dtype.element_ty), mask=o_e < size)


class GpuOps(TorchOps):
    """Operations on a GPU. The memory has one more block, `spare_block`, which no sequence owns: padding rows write there."""

    def __init__(
        self, heads: Sequence[Heads], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(heads, num_blocks + 1, block_size, dtype, device)
        self.spare_block = num_blocks

    def plan(self, spans: Sequence[Span]) -> object:
        """Return the step of `spans`, for `attend`. Spans of one token come first."""
        num_decoding = next((i for i, span in enumerate(spans) if span.num_tokens > 1), len(spans))
        decoding_spans, chunks = spans[:num_decoding], spans[num_decoding:]
        firsts = [*accumulate((len(span.blocks) for span in decoding_spans), initial=0)]
        write = self._upload([self._memory_index(span, i) for span in spans for i in range(span.num_tokens)]).long()
        return Step(
            write=write,
            num_decoding=num_decoding,
            decode_keys=DecodeKeys(
                write=write[:num_decoding],
                starts=self._upload(firsts[:-1]),
                lengths=self._upload([span.position + 1 for span in decoding_spans]),
                table=self._upload([block for span in decoding_spans for block in span.blocks]),
            ),
            chunks=tuple(ChunkKeys(span.row, span.num_tokens, self._memory_indices(span)) for span in chunks),
        )

    def decode_step(self, decode_keys: DecodeKeys) -> object:
        """See `ReplayableOps`."""
        return Step(write=decode_keys.write, num_decoding=len(decode_keys.write), decode_keys=decode_keys)

    def _decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decode_keys: object, heads: Heads
    ) -> torch.Tensor:
        assert isinstance(decode_keys, DecodeKeys)
        return attend(query.contiguous(), keys, values, decode_keys, heads, self.block_size)

    def _memory_indices(self, span: Span) -> torch.Tensor:
        # (L,) int64 memory indices of the tokens up to the span's last.
        num_keys = span.position + span.num_tokens
        blocks = self._upload(span.blocks[: -(-num_keys // self.block_size)]).long()
        indices = blocks[:, None] * self.block_size + torch.arange(self.block_size, device=self._device)
        return indices.flatten()[:num_keys]

    def _memory_index(self, span: Span, token: int) -> int:
        block, within = divmod(span.position + token, self.block_size)
        return span.blocks[block] * self.block_size + within

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int32), self._device)
