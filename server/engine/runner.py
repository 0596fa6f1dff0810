"""Runs the model on a step's chunks: tensors, KV memory and device live here, and no policy.

Shapes: T tokens of a step, V vocabulary, P positions whose logits are wanted.
"""

from collections.abc import Sequence as Items

import torch
from transformers import PreTrainedModel

from lori.errors import ModelError
from lori.kernels import Route, Term
from lori.pool import AdapterPool
from server.engine.attention import ATTENTION, ChunkKeys, KvMemory, StepKeys
from server.engine.scheduler import Chunk

PROBE_LENGTH = 12


class Runner:
    """The base model with its adapters and its KV memory of `num_blocks` blocks."""

    def __init__(self, model: PreTrainedModel, pool: AdapterPool, num_blocks: int, block_size: int) -> None:
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
        hidden = self._model.get_decoder()(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([places], device=device),
            use_cache=False,
            memory=self.memory,
            step=self._step_keys(chunks),
        ).last_hidden_state[0]
        self._pool.active.route = None
        return self._logits(hidden[torch.tensor(positions, dtype=torch.int64, device=device)])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.get_output_embeddings()(hidden).float()
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _route(self, chunks: Items[Chunk]) -> Route | None:
        terms, row = [], 0
        for chunk in chunks:
            stop = row + chunk.stop - chunk.start
            terms += [Term(row, stop, t.slot, t.weight * t.scale) for t in chunk.sequence.request.terms if t.weight]
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
            decode_keys=torch.nn.utils.rnn.pad_sequence(decoding, batch_first=True).to(device) if decoding else torch.empty(0),
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


def prepare(model: PreTrainedModel) -> torch.Tensor:
    """Switches `model` to paged attention and returns the logits (PROBE_LENGTH, V) that it gave before, for `check`."""
    with torch.inference_mode():
        before: torch.Tensor = model(probe(model)[None]).logits[0].float()
    model.set_attn_implementation(ATTENTION)
    return before


def probe(model: PreTrainedModel) -> torch.Tensor:
    """Returns token ids (PROBE_LENGTH,) spread over the vocabulary."""
    size = model.config.get_text_config().vocab_size
    ids: torch.Tensor = (torch.arange(PROBE_LENGTH) * 7919 % size).to(model.device)
    return ids


def check(runner: Runner, model: PreTrainedModel, expected: torch.Tensor, chunks: Items[Chunk]) -> None:
    """Raises `ModelError` unless the runner gives the model's own logits for `chunks`, which hold the probe."""
    try:
        found = runner.forward(chunks, range(PROBE_LENGTH))
    except (NotImplementedError, TypeError) as error:
        raise ModelError(f"models of type {model.config.model_type!r} are not served: {error}") from error
    likeness = torch.nn.functional.cosine_similarity(found, expected).min().item()
    if likeness < 0.99:
        raise ModelError(
            f"models of type {model.config.model_type!r} are not served: paged attention gives other logits than the "
            f"model itself (cosine {likeness:.3f})"
        )
