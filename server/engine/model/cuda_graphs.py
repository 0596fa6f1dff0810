"""CUDA graphs of decoding steps: recorded once for each of a few sizes, replayed with other inputs in one launch.

The inputs lie at fixed places on the device. A step of B sequences runs as one of the next size up: unused rows read one key of
a block that no sequence owns, and write theirs there. All inputs are one int32 array, filled on the host and copied once.
Shapes: B rows of a size, M terms of all rows, N places of the block table, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from lori.device import copy_to_device
from lori.kernels import Route
from lori.pool import AdapterPool
from server.engine.model.decoder import Decoder, Ops, Span

TERMS = 8
"""Terms of a row that there is room for, on average over a size's rows; a step with more of them is not replayed."""
ALIGNED = 4
"""Parts of the array begin at multiples of 16 bytes, as Triton wants it."""
MIN_STRIDE = 16
Terms = Sequence[tuple[int, float]]
"""Slot and weight of each adapter of a row."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Where the keys of B tokens lie, one of each sequence.

    `lengths` (B,) int32 are theirs, at least one, in the blocks of `table` (N,) int32 from `starts` (B,) int32 on; `write` (B,)
    int64 is the place of the newest.
    """

    write: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor


def sizes_up_to(most: int) -> list[int]:
    """Return the sizes of steps up to the first that holds `most`: 1, 2, 4, 8, from there in eights, from 64 on in quarters."""
    sizes = [1]
    while sizes[-1] < most:
        last = sizes[-1]
        sizes.append(2 * last if last < 8 else last + max(8, 1 << last.bit_length() - 3))
    return sizes


class DecodingInputs:
    """Room for the inputs of steps of up to `max_rows` sequences of up to `max_blocks` blocks; `spare_block` is nobody's."""

    def __init__(self, max_rows: int, max_blocks: int, block_size: int, spare_block: int, device: torch.device) -> None:
        self.sizes = sizes_up_to(max_rows)
        most = self.sizes[-1]
        self._block_size, self._spare = block_size, Span(0, 1, 0, [spare_block])
        counts = {
            "ids": 1,
            "positions": 1,
            "write": 1,
            "starts": 1,
            "lengths": 1,
            "segments": 4,
            "slots": TERMS,
            "weights": TERMS,
        }
        ends = np.cumsum([-(-most * count // ALIGNED) * ALIGNED for count in counts.values()]).tolist()
        self._places = dict(zip(counts, zip([0, *ends], ends, strict=False), strict=True))
        self._table_at = ends[-1]
        num_values = self._table_at + most * _stride_of(max_blocks)
        self._host = np.zeros(num_values, dtype=np.int32)
        self._device = torch.zeros(num_values, dtype=torch.int32, device=device)
        self.rows = torch.arange(most, device=device)
        self._stride = 0
        self._known: dict[int, list[int]] = {}  # the blocks of each row that are in the table

    def size_for(self, spans: Sequence[Span], terms: Sequence[Terms]) -> int | None:
        """Return the size that these rows run as, `None` where there is none."""
        if any(span.num_tokens > 1 for span in spans):
            return None
        size = next((size for size in self.sizes if size >= len(spans)), None)
        return size if size and sum(map(len, terms)) <= TERMS * size else None

    def fill(self, size: int, ids: Sequence[int], spans: Sequence[Span], terms: Sequence[Terms]) -> None:
        """Write the inputs of a step of `size` rows and takes them to the device, without waiting for it."""
        num_spare = size - len(spans)
        spans = [*spans, *[self._spare] * num_spare]
        self._part("ids")[:size] = [*ids, *[0] * num_spare]
        self._part("positions")[:size] = [span.position for span in spans]
        self._part("lengths")[:size] = [span.position + 1 for span in spans]
        self._part("write")[:size] = [self._place(span) for span in spans]
        self._fill_table(spans)
        self._fill_terms([*terms, *[()] * num_spare])
        used = self._table_at + size * self._stride
        copy_to_device(torch.from_numpy(self._host[:used]), self._device[:used])

    def decoding(self, size: int) -> Decoding:
        """Return where the keys of a step of this size lie; it reads the places of the device when it is called."""
        write, starts, lengths = (self._there(name)[:size] for name in ("write", "starts", "lengths"))
        return Decoding(write.long(), starts, lengths, self._device[self._table_at :])

    def tokens(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids and positions (B,) int64 of a step of this size, as they are when it is called."""
        return self._there("ids")[:size].long(), self._there("positions")[:size].long()

    def route(self, size: int) -> Route:
        """Return a new route over the terms of a step of this size."""
        segments = self._there("segments")[: 4 * size].view(size, 4)
        return Route.by_token(segments, self._there("slots"), self._there("weights").view(torch.float32))

    def _part(self, name: str) -> NDArray[np.int32]:
        return self._host[slice(*self._places[name])]

    def _there(self, name: str) -> torch.Tensor:
        return self._device[slice(*self._places[name])]

    def _place(self, span: Span) -> int:
        block, within = divmod(span.position, self._block_size)
        return span.blocks[block] * self._block_size + within

    def _fill_table(self, spans: Sequence[Span]) -> None:
        stride = _stride_of(max(len(span.blocks) for span in spans))
        if stride != self._stride:
            self._stride = stride
            self._known.clear()
        self._part("starts")[: len(spans)] = range(0, len(spans) * stride, stride)
        for row, span in enumerate(spans):
            # To compare lists takes a fraction of the time of turning them into an array.
            if self._known.get(row) != span.blocks:
                at = self._table_at + row * stride
                self._host[at : at + len(span.blocks)] = span.blocks
                self._known[row] = [*span.blocks]

    def _fill_terms(self, terms: Sequence[Terms]) -> None:
        slots = [slot for of_row in terms for slot, _ in of_row]
        ends = np.cumsum([len(of_row) for of_row in terms])
        rows = np.arange(len(terms))
        self._part("segments")[: 4 * len(terms)].reshape(-1, 4)[:] = np.stack([rows, rows + 1, np.append(0, ends[:-1]), ends], 1)
        self._part("slots")[: len(slots)] = slots
        self._part("weights").view(np.float32)[: len(slots)] = [weight for of_row in terms for _, weight in of_row]


def _stride_of(num_blocks: int) -> int:
    # Blocks from one row of the table to the next.
    return max(MIN_STRIDE, 1 << (num_blocks - 1).bit_length())


NUM_WARM_UPS = 2
"""Runs before a recording: kernels are compiled and loaded, libraries take their memory."""


class CudaGraphs:
    """Graphs of one device that share their memory: each uses what the others left there, so what one computes in it is gone with
    the next. They run on the current stream, one by one. Once all are gone their memory is, and no more can be recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run `function` a few times, records it, and return its replay. It must not wait for the device."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile, and what they ask of the device is none of this graph's.
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Takes a function, which it may run several times, and returns what does the same again."""


@runtime_checkable
class ReplayableOps(Ops, Protocol):
    """Operations whose step may be one of arrays that change later. No sequence owns `spare_block`."""

    block_size: int
    spare_block: int

    def step_of(self, decoding: Decoding) -> object:
        """Return the step of tokens of which each decodes, for `attend`."""


class Replays:
    """The recorded steps. When the operands of `pool` move, whose addresses are in them, they are forgotten, and new ones are
    recorded by what `start` returns then. `num_tokens` is V."""

    def __init__(
        self,
        decoder: Decoder,
        ops: ReplayableOps,
        pool: AdapterPool,
        inputs: DecodingInputs,
        num_tokens: int,
        start: Callable[[], Record],
    ) -> None:
        self._decoder, self._ops, self._pool, self._inputs = decoder, ops, pool, inputs
        self._start, self._record = start, start()
        self._logits = torch.empty(inputs.sizes[-1], num_tokens, dtype=torch.float32, device=inputs.rows.device)  # of any size
        self._recorded: dict[tuple[int, bool], Replay] = {}
        self._num_moves = pool.num_moves

    @property
    def num_recorded(self) -> int:
        """Steps that are recorded now."""
        return len(self._recorded)

    def prepare(self) -> None:
        """Record every size, with adapters where there can be any, so that no request waits for it."""
        for size in reversed(self._inputs.sizes):  # the memory of the greatest has room for the others
            self._inputs.fill(size, [], [], [])
            for has_terms in {False, self._pool.has_operands}:
                self._replay(size, has_terms)

    def forward(self, ids: Sequence[int], spans: Sequence[Span], terms: Sequence[Terms]) -> torch.Tensor | None:
        """Return the logits (B, V) fp32 of a step, or `None` where it is none that can be replayed: not all of its spans are of
        one token, there are more of them than any size holds, or more of their terms than the size for so many holds.

        They are valid until the next call. Nothing waits for the device, but where a step is recorded.
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
            self._record, self._num_moves = self._start(), self._pool.num_moves
        if (size, has_terms) not in self._recorded:
            self._recorded[size, has_terms] = self._record(lambda: self._compute(size, has_terms))
        self._recorded[size, has_terms]()

    def _compute(self, size: int, has_terms: bool) -> None:
        inputs = self._inputs
        ids, positions = inputs.tokens(size)
        step = self._ops.step_of(inputs.decoding(size))
        route = inputs.route(size) if has_terms else None
        self._logits[:size] = self._decoder.forward(ids, positions, inputs.rows[:size], self._ops, step, route)
