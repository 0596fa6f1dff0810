"""The model runner: computes a step's chunks. Owns tensors, KV memory and device, and makes no scheduling decisions.

Shapes: T tokens of a step, V vocabulary, P positions whose logits are needed.
"""

import logging
import operator
from bisect import bisect_left
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate, pairwise

import torch
from transformers import PreTrainedModel

from lori.device import to_device
from lori.errors import ModelError
from lori.kernels import Route, Term, Weight
from lori.native import MODULE
from lori.pool import AdapterPool
from lori.projection import Quantization
from server.engine.model.cuda_graphs import CudaGraphs, DecodingInputs, ReplayableOps, Replays
from server.engine.model.decoder import Decoder, NeededRows, Ops, Span
from server.engine.model.families import head_size, read_decoder
from server.engine.model.native_ops import BLOCK_TOKENS, LANES, MAX_HEAD, NUM_PRODUCTS, NativeOps, NativeStack, products
from server.engine.model.torch_ops import TorchOps
from server.engine.request import Chunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _CachedRoute:
    # The last route, with the chunks' token counts and term lists. A list's identity tells whether the route is still valid,
    # since a sequence keeps its list while its adapters are acquired.
    counts: list[int]
    terms: list[list[tuple[int, Weight]] | None]
    route: Route | None


class Runner:
    """The base model with its adapters and its KV memory of `num_blocks` blocks.

    Takes the layers' weights out of `model`. On a GPU, decoding steps of up to `max_batch` sequences are replayed once `prepare`
    has run.
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
        self._cached_route = _CachedRoute([], [], None)
        self._replays: Replays | None = None
        try:
            self._ops = make_ops(self._decoder, num_blocks, block_size, self._dtype, self._device)
        except (MemoryError, OSError, RuntimeError) as error:
            content = f"the keys and values of {num_blocks * block_size} tokens"
            raise ModelError(f"--kv-cache-gib: there is no room for {content}: {' '.join(str(error).split())}") from error
        if max_batch and isinstance(self._ops, ReplayableOps):
            try:
                inputs = make_inputs(self._ops, model, num_blocks, max_batch)
                vocabulary, graphs = model.get_output_embeddings().out_features, partial(CudaGraphs, self._device)
                self._replays = Replays(self._decoder, self._ops, pool, inputs, vocabulary, graphs)
            except torch.OutOfMemoryError as error:
                raise ModelError(f"--max-batch: there is no room for such steps: {' '.join(str(error).split())}") from error

    @property
    def decoder(self) -> Decoder:
        """The base model with its adapters' operands. The prompt probe runs its first layers."""
        return self._decoder

    @property
    def attention(self) -> str:
        """Implementation of attention, norms and gates, for a log line."""
        return "C++" if isinstance(self._ops, NativeOps) else "Triton" if self._device.type == "cuda" else "torch"

    @property
    def num_kv_bytes(self) -> int:
        """Size of the memory of keys and values, in bytes, once all of it is written."""
        return self._ops.num_bytes

    def is_broken(self, error: Exception) -> bool:
        """Whether nothing can be computed after `error`: after its first fault a GPU's context is lost."""
        return any(mark in str(error) for mark in ("CUDA error", "Triton Error [CUDA]"))  # not out of memory

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record the steps to replay, if there are any. Raises `ModelError` if there is no room for them."""
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
        """Compute the chunks and return the logits (P, V) fp32 at `positions`, which are rows of the step's tokens.

        Chunks of one token, which decode, must come first.
        """
        ids = [i for c in chunks for i in c.sequence.ids(c.start, c.stop)]
        token_positions = [p for c in chunks for p in range(c.start, c.stop)]
        spans, row = [], 0
        for chunk in chunks:
            spans.append(Span(row, chunk.stop - chunk.start, chunk.start, chunk.sequence.blocks))
            row += chunk.stop - chunk.start
        with on_device(self._device):
            replayed = self._replay(chunks, ids, spans)
            if replayed is not None:
                return replayed[self._upload(positions)]
            route, needed, rows = self._route(chunks), None, sorted({*positions})
            if len(rows) < row:
                needed = NeededRows(self._upload(rows), self._route_of_rows(chunks, rows) if route else None)
            logits = self._decoder.forward(
                self._upload(ids), self._upload(token_positions), self._ops, self._ops.plan(spans), route, needed
            )
            if rows == [*positions]:
                return logits
            return logits[self._upload([bisect_left(rows, position) for position in positions])]

    def _upload(self, numbers: Items[int]) -> torch.Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64), self._device)

    def _replay(self, chunks: Items[Chunk], ids: Items[int], spans: Items[Span]) -> torch.Tensor | None:
        if self._replays is None or not self._can_replay:
            return None
        terms = [chunk.sequence.terms for chunk in chunks]
        try:
            return self._replays.forward(ids, spans, [chunk_terms or () for chunk_terms in terms])
        except torch.OutOfMemoryError:
            logger.exception("there is no room to record steps again: from now on none is replayed")
            self._replays = None
            return None

    def _route(self, chunks: Items[Chunk]) -> Route | None:
        # The route of the last step is reused while the same sequences decode.
        counts = [chunk.stop - chunk.start for chunk in chunks]
        chunk_terms = [chunk.sequence.terms for chunk in chunks]
        cached = self._cached_route
        if cached.counts != counts or any(map(operator.is_not, cached.terms, chunk_terms)):
            self._cached_route = cached = _CachedRoute(counts, chunk_terms, self._make_route(counts, chunk_terms))
        return cached.route

    def _route_of_rows(self, chunks: Items[Chunk], rows: Items[int]) -> Route | None:
        ends = accumulate(chunk.stop - chunk.start for chunk in chunks)
        counts = [after - before for before, after in pairwise([0, *(bisect_left(rows, end) for end in ends)])]
        return self._make_route(counts, [chunk.sequence.terms for chunk in chunks])

    def _make_route(self, counts: Items[int], chunk_terms: Items[list[tuple[int, Weight]] | None]) -> Route | None:
        terms, row = [], 0
        for count, pairs in zip(counts, chunk_terms, strict=True):
            assert pairs is not None, "what runs is pinned"
            terms += [Term(row, row + count, slot, weight) for slot, weight in pairs if count]
            row += count
        return Route.from_terms(terms, row, self._device) if terms else None


def bytes_per_token(model: PreTrainedModel) -> int:
    """Return the bytes of KV memory that a token of `model` takes, over all layers."""
    config = model.config.get_text_config()
    return 2 * int(config.num_hidden_layers) * int(config.num_key_value_heads) * head_size(model) * model.dtype.itemsize


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Make a GPU the thread's current device in a `with` block. Triton launches kernels there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def make_inputs(ops: ReplayableOps, model: PreTrainedModel, num_blocks: int, max_batch: int) -> DecodingInputs:
    """Return buffers for the inputs of steps of `max_batch` sequences, each as long as the model or the memory allows."""
    config = model.config.get_text_config()
    max_blocks = min(num_blocks, -(-config.max_position_embeddings // ops.block_size))
    return DecodingInputs(max_batch, config.num_hidden_layers, max_blocks, ops.block_size, ops.spare_block, model.device)


def make_ops(decoder: Decoder, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> Ops:
    """Return the operations beside the products: a GPU's, the compiled ones if they support the sizes, or torch's."""
    heads = [layer.heads for layer in decoder.layers]
    if device.type == "cuda":  # imported only here, since triton may not be installed elsewhere
        gpu_ops: Ops = import_module("server.engine.model.triton_ops").GpuOps(heads, num_blocks, block_size, dtype, device)
        return gpu_ops
    widths = [len(decoder.norm.weight), *(layer.num_inner for layer in decoder.layers), *(head.head_size for head in heads)]
    has_sizes = block_size % BLOCK_TOKENS == 0 and all(width % LANES == 0 for width in widths)
    is_alike = (
        len({(head.num_heads, head.num_kv_heads) for head in heads}) == 1 and max(head.head_size for head in heads) <= MAX_HEAD
    )
    if MODULE and device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) and has_sizes and is_alike:
        if all(len(products(layer)) == NUM_PRODUCTS for layer in decoder.layers):
            return NativeStack(decoder.layers, num_blocks, block_size, dtype)
        return NativeOps(heads, num_blocks, block_size, dtype)
    return TorchOps(heads, num_blocks, block_size, dtype, device)
