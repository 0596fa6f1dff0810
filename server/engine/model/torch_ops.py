"""A layer's norms, gate and attention in torch: on a CPU without the compiled module, and most of it on a GPU (`gpu_ops`).

Keys and values lie token by token. Spans of one token are attended to together, any longer one by itself.
Shapes: T tokens of a step, S spans, B spans of one token, L keys, C tokens of a span, H heads, G key-value heads, E head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lori.kernels import Route
from server.engine.model.decoder import Heads, Layer, Norm, Span, Turns, run_layers

PAD_TO = 64
ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


@dataclass(frozen=True, slots=True)
class ChunkKeys:
    """The step's tokens [row, row + num_tokens) see the places `keys` (L,), and of those only what stands before them."""

    row: int
    num_tokens: int
    keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """`write` (T,) int64 takes the new keys. The first `num_decoding` tokens, B, see what `decoding` says."""

    write: torch.Tensor
    num_decoding: int
    decoding: object
    chunks: tuple[ChunkKeys, ...] = ()


@dataclass(frozen=True, slots=True)
class _Seen:
    # The first `lengths` (B,) of the places `keys` (B, L).
    keys: torch.Tensor
    lengths: torch.Tensor


class TorchOps:
    """On any device, in any dtype. Memory is (layers, 2, tokens, G, E)."""

    def __init__(
        self, heads: Sequence[Heads], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size, self._device = block_size, device
        one = heads[0]
        self._memory = torch.zeros(
            len(heads), 2, num_blocks * block_size, one.num_kv_heads, one.head_size, dtype=dtype, device=device
        )
        self.num_bytes = self._memory.nbytes

    def plan(self, spans: Sequence[Span]) -> object:
        """Return the step of `spans`, those of one token first, for `attend`."""
        keys = [self._places(span) for span in spans]
        num_decoding = next((i for i, span in enumerate(spans) if span.num_tokens > 1), len(spans))
        return Step(
            write=torch.cat([k[span.position :] for k, span in zip(keys, spans, strict=True)]).to(self._device),
            num_decoding=num_decoding,
            decoding=_Seen(
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

    def attend(self, qkv: torch.Tensor, layer: int, heads: Heads, turns: Turns, step: object) -> torch.Tensor:
        """See `Ops`."""
        assert isinstance(step, Step)
        g, e = heads.num_kv_heads, heads.head_size
        query, key, value = qkv.view(len(qkv), -1, e).split_with_sizes([heads.num_heads, g, g], 1)  # (T, H or G, E)
        query, key = (self._turn(x, norm, turns) for x, norm in ((query, heads.query_norm), (key, heads.key_norm)))
        keys, values = self._memory[layer]  # (tokens, G, E) each
        keys[step.write], values[step.write] = key, value
        if step.num_decoding == len(query):
            return self._decode(query, keys, values, step.decoding, heads).flatten(1)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if step.num_decoding:
            out[: step.num_decoding] = self._decode(query[: step.num_decoding], keys, values, step.decoding, heads)
        for chunk in step.chunks:
            span = slice(chunk.row, chunk.row + chunk.num_tokens)
            out[span] = _prefill(query[span], keys[chunk.keys], values[chunk.keys], heads)
        return out.flatten(1)

    def run(
        self, layers: Sequence[Layer], stream: torch.Tensor, turns: Mapping[str, Turns], step: object, route: Route | None
    ) -> torch.Tensor:
        """See `Ops`."""
        return run_layers(self, layers, stream, turns, step, route)

    def _decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decoding: object, heads: Heads
    ) -> torch.Tensor:
        assert isinstance(decoding, _Seen)
        return _decode(query, keys, values, decoding, heads)

    def _turn(self, x: torch.Tensor, norm: Norm | None, turns: Turns) -> torch.Tensor:
        # Halves of a head are turned against each other.
        wide = x.float()
        if norm is not None:
            wide = F.rms_norm(wide, wide.shape[-1:], norm.weight, norm.epsilon)
        low, high = wide.chunk(2, -1)
        cosine, sine = (of[:, None] for of in turns)  # (T, 1, E)
        return (wide * cosine + torch.cat((-high, low), -1) * sine).to(x.dtype)

    def _places(self, span: Span) -> torch.Tensor:
        # (L,) where the tokens up to the span's last lie in the memory.
        blocks = torch.tensor(span.blocks)[:, None] * self.block_size + torch.arange(self.block_size)
        return blocks.flatten()[: span.position + span.num_tokens]


def _decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: _Seen, heads: Heads) -> torch.Tensor:
    k, v = keys[seen.keys], values[seen.keys]  # (B, L, G, E)
    places = torch.arange(k.shape[1], device=k.device)
    is_seen = places < seen.lengths[:, None]  # (B, L)
    if heads.window:
        is_seen &= places >= seen.lengths[:, None] - heads.window
    grouped = query.unflatten(1, (heads.num_kv_heads, -1)) * heads.scale  # (B, G, H/G, E)
    scores = _capped(torch.einsum("bghe,blge->bghl", grouped, k).float(), heads)
    scores = scores.masked_fill(~is_seen[:, None, None], float("-inf"))
    # What is not seen may be another request's, and not finite: a weight of zero would not hide it.
    v = v.masked_fill(~is_seen[:, :, None, None], 0)
    return torch.einsum("bghl,blge->bghe", scores.softmax(-1).to(v.dtype), v).flatten(1, 2)


def _prefill(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: Heads) -> torch.Tensor:
    num_tokens, num_keys = query.shape[0], keys.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))  # (1, H|G, C|L, E)
    gqa = q.shape[1] != k.shape[1]
    if not heads.softcap and num_tokens == num_keys and not (heads.window and num_keys > heads.window):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale, enable_gqa=gqa)
        return out[0].transpose(0, 1)
    at = torch.arange(num_keys - num_tokens, num_keys, device=q.device)[:, None]
    places = torch.arange(num_keys, device=q.device)
    seen = places <= at
    if heads.window:
        seen &= places > at - heads.window
    if q.is_cuda or heads.softcap:  # with a mask no fast kernel of a GPU knows groups
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if not heads.softcap:
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=heads.scale, enable_gqa=gqa)
        return out[0].transpose(0, 1)
    scores = _capped((q @ k.transpose(-1, -2)).float() * heads.scale, heads).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v)[0].transpose(0, 1)


def _capped(scores: torch.Tensor, heads: Heads) -> torch.Tensor:
    return heads.softcap * torch.tanh(scores / heads.softcap) if heads.softcap else scores


def _stack(places: Sequence[torch.Tensor]) -> torch.Tensor:
    # (B, L) with L a multiple of PAD_TO: on a CPU each new shape of a bf16 product is compiled once more.
    longest = max(map(len, places), default=0)
    stacked = torch.zeros(len(places), -(-longest // PAD_TO) * PAD_TO, dtype=torch.int64)
    for row, found in zip(stacked, places, strict=True):
        row[: len(found)] = found
    return stacked
