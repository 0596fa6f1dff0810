"""Runs the model on a step's chunks: tensors, KV memory and device live here, and no policy.

Shapes: T tokens of a step, V vocabulary, P positions whose logits are wanted.
"""

from collections.abc import Sequence as Items

import torch
from transformers import PreTrainedModel

from lori.kernels import Route, Term
from lori.pool import AdapterPool
from server.engine.attention import ATTENTION, ChunkKeys, KvMemory, StepKeys
from server.engine.scheduler import Chunk

PAD_TO = 64


class Runner:
    """The base model with its adapters and its KV memory of `num_blocks` blocks."""

    def __init__(self, model: PreTrainedModel, pool: AdapterPool, num_blocks: int, block_size: int) -> None:
        assert model.config._attn_implementation == ATTENTION
        self._model, self._pool, self._block_size = model, pool, block_size
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        self._like = weight
        num_layers, num_heads, head_size = _kv_shape(model)
        self.memory = KvMemory(num_layers, num_blocks * block_size, num_heads, head_size, self._like)

    @staticmethod
    def bytes_per_token(model: PreTrainedModel) -> int:
        """Returns how many bytes of KV memory a token of `model` takes, over all layers."""
        num_layers, num_heads, head_size = _kv_shape(model)
        return 2 * num_layers * num_heads * head_size * model.dtype.itemsize

    @torch.inference_mode()
    def forward(self, chunks: Items[Chunk], positions: Items[int]) -> torch.Tensor:
        """Computes the chunks and returns the logits (P, V) fp32 at `positions`, rows of the step's tokens.

        The decoding chunks, those of one token, must come first.
        """
        ids = [i for c in chunks for i in c.sequence.ids(c.start, c.stop)]
        places = [p for c in chunks for p in range(c.start, c.stop)]
        self._pool.active.route = self._route(chunks)
        device = self._like.device
        logits: torch.Tensor = self._model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([places], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(positions, dtype=torch.int64, device=device),
            memory=self.memory,
            step=self._step_keys(chunks),
        ).logits
        self._pool.active.route = None
        return logits[0].float()

    def _route(self, chunks: Items[Chunk]) -> Route | None:
        terms, row = [], 0
        for chunk in chunks:
            stop = row + chunk.stop - chunk.start
            terms += [
                Term(row, stop, self._pool.slot(t.name), t.weight * t.scale) for t in chunk.sequence.request.terms if t.weight
            ]
            row = stop
        return Route.of(terms, row, self._like.device) if terms else None

    def _step_keys(self, chunks: Items[Chunk]) -> StepKeys:
        device = self._like.device
        num_decoding = next((i for i, c in enumerate(chunks) if c.stop - c.start > 1), len(chunks))
        keys = [self._places(c) for c in chunks]
        parts, row = [], num_decoding
        for chunk, seen in zip(chunks[num_decoding:], keys[num_decoding:], strict=True):
            parts.append(ChunkKeys(row, chunk.stop - chunk.start, seen.to(device)))
            row += chunk.stop - chunk.start
        decoding = keys[:num_decoding]
        return StepKeys(
            write=torch.cat([k[c.start :] for k, c in zip(keys, chunks, strict=True)]).to(device),
            decode_keys=_stack(decoding).to(device),
            decode_lengths=torch.tensor([len(k) for k in decoding], device=device),
            chunks=tuple(parts),
        )

    def _places(self, chunk: Chunk) -> torch.Tensor:
        # (L,) where the tokens [0, stop) of the chunk's sequence lie in the KV memory.
        blocks = torch.tensor(chunk.sequence.blocks)[:, None] * self._block_size + torch.arange(self._block_size)
        return blocks.flatten()[: chunk.stop]


def _kv_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    # Layers, key-value heads, size of a head.
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return (
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _stack(places: Items[torch.Tensor]) -> torch.Tensor:
    # (B, L) with L a multiple of PAD_TO: on a CPU each new shape of a bf16 product is compiled once more.
    longest = max(map(len, places), default=0)
    stacked = torch.zeros(len(places), -(-longest // PAD_TO) * PAD_TO, dtype=torch.int64)
    for row, found in zip(stacked, places, strict=True):
        row[: len(found)] = found
    return stacked
