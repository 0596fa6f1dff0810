"""A layer's norms, gate and attention in torch: used on a CPU without the compiled module, and in part on a GPU (`triton_ops`).

Keys and values are stored token by token. Spans of one token are computed together, each longer span by itself. Shapes: T tokens
of a step, S spans, B spans of one token, L keys, C tokens of a span, H heads, G key-value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from server.engine.model.decoder import ForwardContext, Heads, Layer, Norm, Rotary, Span, run_layers

PAD_TO = 64
ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


@dataclass(frozen=True, slots=True)
class ChunkKeys:
    """The step's tokens [row, row + num_tokens), and the memory indices `keys` (L,) that they attend to, causally."""

    row: int
    num_tokens: int
    keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """The plan of a step. The T new keys are written to the memory indices `write` (T,) int64.

    The first `num_decoding` tokens, B, attend to `decode_keys`, the others to the keys in `chunks`.
    """

    write: torch.Tensor
    num_decoding: int
    decode_keys: object
    chunks: tuple[ChunkKeys, ...] = ()


@dataclass(frozen=True, slots=True)
class _PaddedKeys:
    # The first `lengths` (B,) of the memory indices `keys` (B, L) are a row's keys.
    keys: torch.Tensor
    lengths: torch.Tensor


class TorchOps:
    """Operations on any device, in any dtype. The memory is (layers, 2, tokens, G, E)."""

    def __init__(
        self, heads: Sequence[Heads], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size, self._device = block_size, device
        first = heads[0]
        self._memory = torch.zeros(
            len(heads), 2, num_blocks * block_size, first.num_kv_heads, first.head_size, dtype=dtype, device=device
        )
        self.num_bytes = self._memory.nbytes

    def plan(self, spans: Sequence[Span]) -> object:
        """Return the step of `spans`, for `attend`. Spans of one token come first."""
        keys = [self._memory_indices(span) for span in spans]
        num_decoding = next((i for i, span in enumerate(spans) if span.num_tokens > 1), len(spans))
        return Step(
            write=torch.cat([k[span.position :] for k, span in zip(keys, spans, strict=True)]).to(self._device),
            num_decoding=num_decoding,
            decode_keys=_PaddedKeys(
                keys=_stack(keys[:num_decoding]).to(self._device),
                lengths=torch.tensor([len(k) for k in keys[:num_decoding]], device=self._device),
            ),
            chunks=tuple(
                ChunkKeys(span.row, span.num_tokens, k.to(self._device))
                for k, span in zip(keys[num_decoding:], spans[num_decoding:], strict=True)
            ),
        )

    def norm(self, stream: torch.Tensor, added: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        """See `Ops`."""
        if added is not None:
            stream += added
        return F.rms_norm(stream.float(), stream.shape[-1:], norm.weight, norm.epsilon).to(stream.dtype)

    def gate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """See `Ops`."""
        gated, up = x.chunk(2, -1)
        return ACTIVATIONS[activation](gated) * up

    def attend(self, qkv: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, step: object) -> torch.Tensor:
        """See `Ops`."""
        assert isinstance(step, Step)
        g, e = heads.num_kv_heads, heads.head_size
        query, key, value = qkv.view(len(qkv), -1, e).split_with_sizes([heads.num_heads, g, g], 1)  # (T, H or G, E)
        query, key = (self._apply_rope(x, norm, rotary) for x, norm in ((query, heads.query_norm), (key, heads.key_norm)))
        keys, values = self._memory[layer]  # (tokens, G, E) each
        keys[step.write], values[step.write] = key, value
        if step.num_decoding == len(query):
            return self._decode(query, keys, values, step.decode_keys, heads).flatten(1)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if step.num_decoding:
            out[: step.num_decoding] = self._decode(query[: step.num_decoding], keys, values, step.decode_keys, heads)
        for chunk in step.chunks:
            span = slice(chunk.row, chunk.row + chunk.num_tokens)
            out[span] = _prefill(query[span], keys[chunk.keys], values[chunk.keys], heads)
        return out.flatten(1)

    def run(self, layers: Sequence[Layer], stream: torch.Tensor, context: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ops`."""
        return run_layers(self, layers, stream, context)

    def _decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decode_keys: object, heads: Heads
    ) -> torch.Tensor:
        assert isinstance(decode_keys, _PaddedKeys)
        return _decode(query, keys, values, decode_keys, heads)

    def _apply_rope(self, x: torch.Tensor, norm: Norm | None, rotary: Rotary) -> torch.Tensor:
        # RoPE rotates the two halves of a head against each other.
        wide = x.float()
        if norm is not None:
            wide = F.rms_norm(wide, wide.shape[-1:], norm.weight, norm.epsilon)
        low, high = wide.chunk(2, -1)
        cosine, sine = (table[:, None] for table in rotary)  # (T, 1, E)
        return (wide * cosine + torch.cat((-high, low), -1) * sine).to(x.dtype)

    def _memory_indices(self, span: Span) -> torch.Tensor:
        # (L,) memory indices of the tokens up to the span's last.
        blocks = torch.tensor(span.blocks)[:, None] * self.block_size + torch.arange(self.block_size)
        return blocks.flatten()[: span.position + span.num_tokens]


def _decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, padded: _PaddedKeys, heads: Heads) -> torch.Tensor:
    k, v = keys[padded.keys], values[padded.keys]  # (B, L, G, E)
    indices = torch.arange(k.shape[1], device=k.device)
    is_visible = indices < padded.lengths[:, None]  # (B, L)
    if heads.window:
        is_visible &= indices >= padded.lengths[:, None] - heads.window
    grouped = query.unflatten(1, (heads.num_kv_heads, -1)) * heads.scale  # (B, G, H/G, E)
    scores = _capped(torch.einsum("bghe,blge->bghl", grouped, k).float(), heads)
    scores = scores.masked_fill(~is_visible[:, None, None], float("-inf"))
    # Padding may point to another request's values, which may not be finite: a weight of zero would not hide them.
    v = v.masked_fill(~is_visible[:, :, None, None], 0)
    return torch.einsum("bghl,blge->bghe", scores.softmax(-1).to(v.dtype), v).flatten(1, 2)


def _prefill(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: Heads) -> torch.Tensor:
    num_tokens, num_keys = query.shape[0], keys.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))  # (1, H|G, C|L, E)
    gqa = q.shape[1] != k.shape[1]
    if not heads.softcap and num_tokens == num_keys and not (heads.window and num_keys > heads.window):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale, enable_gqa=gqa)
        return out[0].transpose(0, 1)
    query_positions = torch.arange(num_keys - num_tokens, num_keys, device=q.device)[:, None]
    key_positions = torch.arange(num_keys, device=q.device)
    mask = key_positions <= query_positions
    if heads.window:
        mask &= key_positions > query_positions - heads.window
    if q.is_cuda or heads.softcap:  # no fast kernel of a GPU supports both a mask and grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if not heads.softcap:
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=heads.scale, enable_gqa=gqa)
        return out[0].transpose(0, 1)
    scores = _capped((q @ k.transpose(-1, -2)).float() * heads.scale, heads).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v)[0].transpose(0, 1)


def _capped(scores: torch.Tensor, heads: Heads) -> torch.Tensor:
    return heads.softcap * torch.tanh(scores / heads.softcap) if heads.softcap else scores


def _stack(keys: Sequence[torch.Tensor]) -> torch.Tensor:
    # (B, L) with L a multiple of PAD_TO: on a CPU, each new shape of a bf16 product is compiled once more.
    longest = max(map(len, keys), default=0)
    stacked = torch.zeros(len(keys), -(-longest // PAD_TO) * PAD_TO, dtype=torch.int64)
    for row, indices in zip(stacked, keys, strict=True):
        row[: len(indices)] = indices
    return stacked
