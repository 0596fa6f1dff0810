"""Decoding steps that are recorded once for each of a few sizes, and replayed with other inputs: one launch in place of hundreds.

What a recording is, is for others to say: a CUDA graph on a GPU. It must do again what the recorded function did, to the same
places of the device, whatever lies there then. Shapes: B rows of a step, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from lori.pool import AdapterPool
from server.engine.model.decoder import Decoder, Ops
from server.engine.model.decoding_inputs import Decoding, DecodingInputs, Terms
from server.engine.model.spans import Span

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Takes a function, which it may run several times, and returns what does the same again."""


@runtime_checkable
class ReplayableOps(Ops, Protocol):
    """Operations whose step may be one of arrays that change later. No sequence owns `spare_block`."""

    block_size: int
    spare_block: int

    def step_of(self, decoding: Decoding) -> object:
        """Returns the step of tokens of which each decodes, for `attend`."""


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
        """Records every size, with adapters where there can be any, so that no request waits for it."""
        for size in reversed(self._inputs.sizes):  # the memory of the greatest has room for the others
            self._inputs.fill(size, [], [], [])
            for has_terms in {False, self._pool.has_operands}:
                self._replay(size, has_terms)

    def forward(self, ids: Sequence[int], spans: Sequence[Span], terms: Sequence[Terms]) -> torch.Tensor | None:
        """Returns the logits (B, V) fp32 of a step, or `None` where it is none that can be replayed: not all of its spans are of
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
