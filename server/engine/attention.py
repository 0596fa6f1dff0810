"""Attention over paged KV memory, under transformers' attention interface.

A step's tokens lie in one row. Sequences that decode one token each are attended to together; a prompt's chunk by itself.
Shapes: T tokens of a step, B decoding sequences, L keys, C tokens of a chunk, H heads, G key-value heads, E head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION = "lori_paged"
"""The name under which transformers finds `paged_attention`."""


@dataclass(frozen=True, slots=True)
class ChunkKeys:
    """A chunk's tokens [row, row + C) of the step; they see `keys` (L,), and of those only what stands before them."""

    row: int
    num_tokens: int
    keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepKeys:
    """Where a step's keys are: `write` (T,) takes the new ones.

    The first B tokens of the step decode: `decode_keys` (B, L), L padded to a round number, are the places of what they see,
    `decode_lengths` (B,) how many of those are real. All places count tokens in the KV memory.
    """

    write: torch.Tensor
    decode_keys: torch.Tensor
    decode_lengths: torch.Tensor
    chunks: tuple[ChunkKeys, ...]


class KvMemory:
    """Keys and values of every layer, (layers, 2, tokens, G, E), in the dtype and on the device of `like`."""

    def __init__(self, num_layers: int, num_tokens: int, num_kv_heads: int, head_size: int, like: torch.Tensor) -> None:
        self.tensor = like.new_zeros(num_layers, 2, num_tokens, num_kv_heads, head_size)

    @property
    def num_bytes(self) -> int:
        """What it holds, in bytes."""
        return self.tensor.numel() * self.tensor.element_size()


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # the step's own places say who sees what
    *,
    memory: KvMemory,
    step: StepKeys,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Writes the step's keys and values, then attends: (1, H, T, E) and (1, G, T, E) give (1, T, H, E).

    Raises `NotImplementedError` for a model that caps its scores.
    """
    if softcap is not None:
        raise NotImplementedError("attention with a soft cap on its scores is not served")
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys, values = memory.tensor[layer]  # (tokens, G, E) each
    keys[step.write] = key[0].transpose(0, 1)
    values[step.write] = value[0].transpose(0, 1)
    rows = query[0].transpose(0, 1)  # (T, H, E)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if num_decoding := len(step.decode_lengths):
        out[:num_decoding] = _decode(rows[:num_decoding], keys, values, step, scaling, sliding_window)
    for chunk in step.chunks:
        span = slice(chunk.row, chunk.row + chunk.num_tokens)
        out[span] = _prefill(rows[span], keys[chunk.keys], values[chunk.keys], scaling, sliding_window)
    return out[None], None


def _decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: StepKeys, scaling: float, window: int | None
) -> torch.Tensor:
    num_kv_heads = keys.shape[1]
    k, v = keys[step.decode_keys], values[step.decode_keys]  # (B, L, G, E)
    places = torch.arange(k.shape[1], device=k.device)
    seen = places < step.decode_lengths[:, None]  # (B, L)
    if window:
        seen &= places >= step.decode_lengths[:, None] - window
    grouped = query.unflatten(1, (num_kv_heads, -1)) * scaling  # (B, G, H/G, E)
    scores = torch.einsum("bghe,blge->bghl", grouped, k).float()
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    # What is not seen may be another request's, and not finite: a weight of zero would not hide it.
    v = v.masked_fill(~seen[:, :, None, None], 0)
    return torch.einsum("bghl,blge->bghe", scores.softmax(-1).to(v.dtype), v).flatten(1, 2)


def _prefill(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
    num_tokens, num_keys = query.shape[0], keys.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))  # (1, H|G, C|L, E)
    gqa = q.shape[1] != k.shape[1]
    if num_tokens == num_keys and (window is None or num_keys <= window):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
    else:
        at = torch.arange(num_keys - num_tokens, num_keys, device=q.device)[:, None]
        places = torch.arange(num_keys, device=q.device)
        seen = places <= at
        if window:
            seen &= places > at - window
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=gqa)
    return out[0].transpose(0, 1)


AttentionInterface.register(ATTENTION, paged_attention)
