"""CUDA graphs of decoding steps: recorded once for each of a few sizes, replayed with other inputs in one launch.

The inputs have fixed addresses on the device. A step of B sequences runs as the next recorded size. Its unused rows read and
write one key of a block that no sequence owns. All inputs are one int32 array, filled on the host and copied once. Shapes: B rows
of a size, L layers, M terms of all rows, N entries of the block table, V vocabulary.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from lori.device import copy_to_device
from lori.kernels import Route, Weight
from lori.kernels.route import ALIGNMENT, weight_array
from lori.pool import AdapterPool
from server.engine.model.decoder import Decoder, Ops, Span

TERMS = 8
"""Terms per row that the inputs have room for, averaged over the rows of a size. A step with more terms is not replayed."""
MIN_STRIDE = 16
Terms = Sequence[tuple[int, Weight]]
"""Slot and weight of each adapter of a row."""


@dataclass(frozen=True, slots=True)
class DecodeKeys:
    """The keys of B decoding tokens, one token of each sequence.

    A row has `lengths` (B,) int32 keys, at least one. They are in the blocks that `table` (N,) int32 lists from `starts` (B,)
    int32 on. `write` (B,) int64 is the memory index of the newest key.
    """

    write: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor


def graph_sizes(max_rows: int) -> list[int]:
    """Return the sizes to record, up to the first that holds `max_rows`.

    They are 1, 2, 4, 8, then multiples of 8, and from 64 on quarters of the powers of two.
    """
    sizes = [1]
    while sizes[-1] < max_rows:
        last = sizes[-1]
        sizes.append(2 * last if last < 8 else last + max(8, 1 << last.bit_length() - 3))
    return sizes


class DecodingInputs:
    """Buffers for the inputs of steps of up to `max_rows` sequences of up to `max_blocks` blocks each.

    No sequence owns `spare_block`. Each of `num_layers` layers has its own weights of the terms.
    """

    def __init__(
        self, max_rows: int, num_layers: int, max_blocks: int, block_size: int, spare_block: int, device: torch.device
    ) -> None:
        self.sizes, self._num_layers = graph_sizes(max_rows), num_layers
        max_size = self.sizes[-1]
        self._block_size, self._spare = block_size, Span(0, 1, 0, [spare_block])
        counts = {
            "ids": 1,
            "positions": 1,
            "write": 1,
            "starts": 1,
            "lengths": 1,
            "segments": 4,
            "slots": TERMS,
            "weights": TERMS * num_layers,
        }
        ends = np.cumsum([-(-max_size * count // ALIGNMENT) * ALIGNMENT for count in counts.values()]).tolist()
        self._ranges = dict(zip(counts, zip([0, *ends], ends, strict=False), strict=True))
        self._table_start = ends[-1]
        num_values = self._table_start + max_size * _table_stride(max_blocks)
        self._host = np.zeros(num_values, dtype=np.int32)
        self._device = torch.zeros(num_values, dtype=torch.int32, device=device)
        self.device = device
        self._stride = 0
        self._table_rows: dict[int, list[int]] = {}  # the blocks of each row, as they are in the table
        self._filled_terms: Sequence[Terms] = ()  # the terms of each row in the arrays

    def size_for(self, spans: Sequence[Span], terms: Sequence[Terms]) -> int | None:
        """Return the size that these rows run as, or None if no size holds them."""
        if any(span.num_tokens > 1 for span in spans):
            return None
        size = next((size for size in self.sizes if size >= len(spans)), None)
        return size if size and sum(map(len, terms)) <= TERMS * size else None

    def fill(self, size: int, ids: Sequence[int], spans: Sequence[Span], terms: Sequence[Terms]) -> None:
        """Write the inputs of a step of `size` rows and copy them to the device, without waiting for the device."""
        num_spare = size - len(spans)
        spans = [*spans, *[self._spare] * num_spare]
        self._host_part("ids")[:size] = [*ids, *[0] * num_spare]
        self._host_part("positions")[:size] = [span.position for span in spans]
        self._host_part("lengths")[:size] = [span.position + 1 for span in spans]
        self._host_part("write")[:size] = [self._memory_index(span) for span in spans]
        self._fill_table(spans)
        self._fill_terms([*terms, *[()] * num_spare])
        used = self._table_start + size * self._stride
        copy_to_device(torch.from_numpy(self._host[:used]), self._device[:used])

    def decode_keys(self, size: int) -> DecodeKeys:
        """Return the keys of a step of this size. Reads the device's inputs at the time of the call."""
        write, starts, lengths = (self._device_part(name)[:size] for name in ("write", "starts", "lengths"))
        return DecodeKeys(write.long(), starts, lengths, self._device[self._table_start :])

    def tokens(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids and positions (B,) int64 of a step of this size, read at the time of the call."""
        return self._device_part("ids")[:size].long(), self._device_part("positions")[:size].long()

    def route(self, size: int) -> Route:
        """Return a new route over the terms of a step of this size."""
        segments = self._device_part("segments")[: 4 * size].view(size, 4)
        weights = self._device_part("weights").view(torch.float32).view(self._num_layers, -1)
        return Route.by_token(segments, self._device_part("slots"), weights)

    def _host_part(self, name: str) -> NDArray[np.int32]:
        return self._host[slice(*self._ranges[name])]

    def _device_part(self, name: str) -> torch.Tensor:
        return self._device[slice(*self._ranges[name])]

    def _memory_index(self, span: Span) -> int:
        block, within = divmod(span.position, self._block_size)
        return span.blocks[block] * self._block_size + within

    def _fill_table(self, spans: Sequence[Span]) -> None:
        stride = _table_stride(max(len(span.blocks) for span in spans))
        if stride != self._stride:
            self._stride = stride
            self._table_rows.clear()
        self._host_part("starts")[: len(spans)] = range(0, len(spans) * stride, stride)
        for row, span in enumerate(spans):
            # Comparing lists takes a fraction of the time of converting them to an array.
            if self._table_rows.get(row) != span.blocks:
                start = self._table_start + row * stride
                self._host[start : start + len(span.blocks)] = span.blocks
                self._table_rows[row] = [*span.blocks]

    def _fill_terms(self, terms: Sequence[Terms]) -> None:
        # A sequence keeps its list while its adapters are acquired. Written each time, weights by layer would delay every step.
        filled = self._filled_terms
        if len(terms) == len(filled) and all(map(operator.is_, terms, filled)):
            return
        self._filled_terms = terms
        slots = [slot for row_terms in terms for slot, _ in row_terms]
        ends = np.cumsum([len(row_terms) for row_terms in terms])
        rows = np.arange(len(terms))
        self._host_part("segments")[: 4 * len(terms)].reshape(-1, 4)[:] = np.stack(
            [rows, rows + 1, np.append(0, ends[:-1]), ends], 1
        )
        self._host_part("slots")[: len(slots)] = slots
        weights = self._host_part("weights").view(np.float32).reshape(self._num_layers, -1)
        weights[:, : len(slots)] = weight_array([weight for row_terms in terms for _, weight in row_terms])


def _table_stride(num_blocks: int) -> int:
    # Blocks from one row of the table to the next.
    return max(MIN_STRIDE, 1 << (num_blocks - 1).bit_length())


NUM_WARM_UPS = 2
"""Number of runs before recording: they compile and load kernels, and let libraries allocate their memory."""


class CudaGraphs:
    """A recorder of CUDA graphs on one device that share their memory.

    Each graph overwrites the memory of the others, so a graph's results last only until the next replay. Graphs run on the
    current stream, one at a time. Once all graphs are freed, their shared memory is freed, too, and no more graphs can be
    recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run `function` a few times, record it, and return its replay. The function must not wait for the device."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; their work is not captured.
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Records a function, which it may run several times, and returns the replay."""


@runtime_checkable
class ReplayableOps(Ops, Protocol):
    """Operations that can run a step from arrays that change later. No sequence owns `spare_block`."""

    block_size: int
    spare_block: int

    def decode_step(self, decode_keys: DecodeKeys) -> object:
        """Return the step of tokens that all decode, for `attend`."""


class Replays:
    """The recorded decoding steps.

    The graphs contain the addresses of the operands of `pool`. When these move, all graphs are dropped, and new ones are recorded
    by a new recorder of `make_recorder`. `num_tokens` is V.
    """

    def __init__(
        self,
        decoder: Decoder,
        ops: ReplayableOps,
        pool: AdapterPool,
        inputs: DecodingInputs,
        num_tokens: int,
        make_recorder: Callable[[], Record],
    ) -> None:
        self._decoder, self._ops, self._pool, self._inputs = decoder, ops, pool, inputs
        self._make_recorder, self._record = make_recorder, make_recorder()
        # All sizes share the logits.
        self._logits = torch.empty(inputs.sizes[-1], num_tokens, dtype=torch.float32, device=inputs.device)
        self._recorded: dict[tuple[int, bool], Replay] = {}
        self._num_moves = pool.num_moves

    @property
    def num_recorded(self) -> int:
        """Number of steps that are recorded now."""
        return len(self._recorded)

    def prepare(self) -> None:
        """Record every size, with and without adapters if there can be any, so that no request waits for a recording."""
        for size in reversed(self._inputs.sizes):  # largest first: its memory has room for the others
            self._inputs.fill(size, [], [], [])
            for has_terms in {False, self._pool.has_operands}:
                self._replay(size, has_terms)

    def forward(self, ids: Sequence[int], spans: Sequence[Span], terms: Sequence[Terms]) -> torch.Tensor | None:
        """Return the logits (B, V) fp32 of a step, or None if the step cannot be replayed.

        A step is not replayed if a span has several tokens, if no size holds its rows, or if it has too many terms for its size.
        The logits are valid until the next call. Waits for the device only to record a step.
        """
        size = self._inputs.size_for(spans, terms)
        if size is None:
            return None
        self._inputs.fill(size, ids, spans, terms)
        self._replay(size, has_terms=any(terms))
        return self._logits[: len(spans)]

    def _replay(self, size: int, has_terms: bool) -> None:
        if self._num_moves != self._pool.num_moves:
            self._recorded.clear()
            self._record, self._num_moves = self._make_recorder(), self._pool.num_moves
        if (size, has_terms) not in self._recorded:
            self._recorded[size, has_terms] = self._record(lambda: self._compute(size, has_terms))
        self._recorded[size, has_terms]()

    def _compute(self, size: int, has_terms: bool) -> None:
        inputs = self._inputs
        ids, positions = inputs.tokens(size)
        step = self._ops.decode_step(inputs.decode_keys(size))
        route = inputs.route(size) if has_terms else None
        self._logits[:size] = self._decoder.forward(ids, positions, self._ops, step, route)
