"""Runs the model on a step's chunks: tensors, KV memory and device live here, and no policy.

Shapes: T tokens of a step, V vocabulary, P positions whose logits are wanted.
"""

import logging
import operator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from transformers import PreTrainedModel

from lori.device import to_device
from lori.errors import ModelError
from lori.kernels import Route, Term
from lori.kernels.native import MODULE
from lori.pool import AdapterPool
from lori.projection import Quantization
from server.engine.model.cuda_graphs import CudaGraphs, DecodingInputs, ReplayableOps, Replays
from server.engine.model.decoder import Decoder, Ops, Span
from server.engine.model.families import head_size, read_decoder
from server.engine.model.native_ops import BLOCK_TOKENS, LANES, MAX_HEAD, NUM_PRODUCTS, NativeOps, NativeStack, products
from server.engine.model.torch_ops import TorchOps
from server.engine.request import Chunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Routed:
    # A route, the tokens of each chunk, and the chunks' own lists of terms: a pinned sequence keeps its own.
    counts: list[int]
    terms: list[list[tuple[int, float]] | None]
    route: Route | None


class Runner:
    """The base model with its adapters and its KV memory of `num_blocks` blocks.

    Takes the layers' weights out of `model`. On a GPU steps of up to `max_batch` sequences that only decode are replayed, once
    they are prepared.
    """

    _can_replay = False

    def __init__(
        self,
        model: PreTrainedModel,
        pool: AdapterPool,
        num_blocks: int,
        block_size: int,
        max_batch: int = 0,
        quantization: Quantization | None = None,
    ) -> None:
        self._dtype, self._device = model.dtype, model.device
        try:
            with torch.inference_mode():
                self._decoder: Decoder = read_decoder(model, pool, quantization)
        except MemoryError as error:
            raise ModelError(f"there is no room for the base model's weights: {error}") from error
        self._routed = _Routed([], [], None)
        self._replays: Replays | None = None
        try:
            self._ops = make_ops(self._decoder, num_blocks, block_size, self._dtype, self._device)
        except (MemoryError, OSError, RuntimeError) as error:
            room = f"the keys and values of {num_blocks * block_size} tokens"
            raise ModelError(f"--kv-cache-gib: there is no room for {room}: {' '.join(str(error).split())}") from error
        if max_batch and isinstance(self._ops, ReplayableOps):
            try:
                inputs = make_inputs(self._ops, model, num_blocks, max_batch)
                vocabulary, graphs = model.get_output_embeddings().out_features, partial(CudaGraphs, self._device)
                self._replays = Replays(self._decoder, self._ops, pool, inputs, vocabulary, graphs)
            except torch.OutOfMemoryError as error:
                raise ModelError(f"--max-batch: there is no room for such steps: {' '.join(str(error).split())}") from error

    @property
    def attention(self) -> str:
        """What computes all but the products, for a log."""
        return "C++" if isinstance(self._ops, NativeOps) else "Triton" if self._device.type == "cuda" else "torch"

    @property
    def num_kv_bytes(self) -> int:
        """What the memory of keys and values holds when all of it is written, in bytes."""
        return self._ops.num_bytes

    def is_broken(self, error: Exception) -> bool:
        """Whether after `error` nothing can be computed any more: a GPU's memory is lost with its first fault."""
        return any(sign in str(error) for sign in ("CUDA error", "Triton Error [CUDA]"))  # not where it is out of memory

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record the steps that are replayed, if any. Raises `ModelError` where there is no room for them."""
        if self._replays is None:
            return
        try:
            with on_device(self._device):
                self._replays.prepare()
            self._can_replay = True
        except torch.OutOfMemoryError as error:
            raise ModelError(f"--max-batch: there is no room for such steps: {' '.join(str(error).split())}") from error

    @torch.inference_mode()
    def forward(self, chunks: Items[Chunk], positions: Items[int]) -> torch.Tensor:
        """Compute the chunks and returns the logits (P, V) fp32 at `positions`, rows of the step's tokens.

        The decoding chunks, those of one token, must come first.
        """
        ids = [i for c in chunks for i in c.sequence.ids(c.start, c.stop)]
        places = [p for c in chunks for p in range(c.start, c.stop)]
        spans, row = [], 0
        for chunk in chunks:
            spans.append(Span(row, chunk.stop - chunk.start, chunk.start, chunk.sequence.blocks))
            row += chunk.stop - chunk.start
        with on_device(self._device):
            replayed = self._replay(chunks, ids, spans)
            if replayed is not None:
                return replayed[self._upload(positions)]
            return self._decoder.forward(
                self._upload(ids),
                self._upload(places),
                self._upload(positions),
                self._ops,
                self._ops.plan(spans),
                self._route(chunks, row),
            )

    def _upload(self, numbers: Items[int]) -> torch.Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64), self._device)

    def _replay(self, chunks: Items[Chunk], ids: Items[int], spans: Items[Span]) -> torch.Tensor | None:
        if self._replays is None or not self._can_replay:
            return None
        terms = [chunk.sequence.terms for chunk in chunks]
        try:
            return self._replays.forward(ids, spans, [of or () for of in terms])
        except torch.OutOfMemoryError:
            logger.exception("there is no room to record steps again: from now on none is replayed")
            self._replays = None
            return None

    def _route(self, chunks: Items[Chunk], num_tokens: int) -> Route | None:
        # While the same sequences decode it is the one of the step before.
        counts = [chunk.stop - chunk.start for chunk in chunks]
        of_chunks = [chunk.sequence.terms for chunk in chunks]
        before = self._routed
        if before.counts != counts or any(map(operator.is_not, before.terms, of_chunks)):
            terms, row = [], 0
            for count, of_chunk in zip(counts, of_chunks, strict=True):
                assert of_chunk is not None, "what runs is pinned"
                terms += [Term(row, row + count, slot, weight) for slot, weight in of_chunk]
                row += count
            route = Route.of(terms, num_tokens, self._device) if terms else None
            self._routed = before = _Routed(counts, of_chunks, route)
        return before.route


def bytes_per_token(model: PreTrainedModel) -> int:
    """Return how many bytes of KV memory a token of `model` takes, over all layers."""
    config = model.config.get_text_config()
    return 2 * int(config.num_hidden_layers) * int(config.num_key_value_heads) * head_size(model) * model.dtype.itemsize


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Make a GPU the thread's own for a while: Triton launches on that one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def make_inputs(ops: ReplayableOps, model: PreTrainedModel, num_blocks: int, max_batch: int) -> DecodingInputs:
    """Return room for the inputs of steps of `max_batch` sequences, each as long as the model or the memory allows."""
    longest = -(-model.config.get_text_config().max_position_embeddings // ops.block_size)
    return DecodingInputs(max_batch, min(num_blocks, longest), ops.block_size, ops.spare_block, model.device)


def make_ops(decoder: Decoder, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> Ops:
    """Return the operations beside the products: a GPU's, the compiled ones where they know the sizes, or torch's."""
    heads = [layer.heads for layer in decoder.layers]
    if device.type == "cuda":  # read here alone: elsewhere triton may be missing
        of_gpu: Ops = import_module("server.engine.model.triton_ops").GpuOps(heads, num_blocks, block_size, dtype, device)
        return of_gpu
    widths = [len(decoder.norm.weight), *(layer.num_inner for layer in decoder.layers), *(of.head_size for of in heads)]
    has_sizes = block_size % BLOCK_TOKENS == 0 and all(width % LANES == 0 for width in widths)
    is_alike = len({(of.num_heads, of.num_kv_heads) for of in heads}) == 1 and max(of.head_size for of in heads) <= MAX_HEAD
    if MODULE and device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) and has_sizes and is_alike:
        if all(len(products(layer)) == NUM_PRODUCTS for layer in decoder.layers):
            return NativeStack(decoder.layers, num_blocks, block_size, dtype)
        return NativeOps(heads, num_blocks, block_size, dtype)
    return TorchOps(heads, num_blocks, block_size, dtype, device)
