"""Picks the next tokens of a step, over the whole batch. Every choice of a request has a random stream of its own.

Shapes: P rows, V vocabulary, R rows that are drawn.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from weakref import WeakKeyDictionary

import numpy as np
import torch

from lori.device import to_device
from server.engine.request import Sequence
from server.engine.sampling.cutoff import cut, draw_few
from server.engine.sampling.draw import draw
from server.engine.sampling.grammar_masks import GrammarMasks
from server.engine.sampling.grammar_state import Words
from server.engine.sampling.grammars import Grammars
from server.engine.sampling.logit_edits import LogitEdits, edited
from server.engine.sampling.sampling_batch import SamplingBatch, SamplingState


class Sampler:
    """Picks tokens, and keeps what it must know of each sequence as long as the sequence lives.

    `stop_ids` are the tokens that `min_tokens` forbids; `grammars` has the requests' own.
    """

    def __init__(self, stop_ids: Iterable[int], grammars: Grammars | None = None) -> None:
        self._stop_ids, self._grammars = np.array(sorted(stop_ids), dtype=np.int64), grammars
        self._states: WeakKeyDictionary[Sequence, SamplingState] = WeakKeyDictionary()
        self._batch: SamplingBatch | None = None
        self._memory: torch.Tensor | None = None
        self._masks = GrammarMasks()

    @torch.inference_mode()
    def pick(self, logits: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
        """Picks the next token of each sequence from its row of `logits` (P, V), fp32 and contiguous, which stay the same.

        Returns the tokens, and 1 for the sound rows, as a tensor (2, P) int64 on the logits' device, and does not wait for it.
        A row is not sound with NaN or infinity among its logits (0), or with every token forbidden (-1): its token means nothing.
        """
        batch = self._batch_of(sequences, logits.device)
        tokens = likeliest(logits)
        peaks = logits.gather(1, tokens[:, None])  # (P, 1)
        is_sound = peaks.isfinite().long()
        allowed = self._allowed(batch)
        edits = self._active(batch)
        with edited(logits, edits), self._masks.confined(logits, allowed):
            if changed := sorted({*edits, *allowed}):
                rows = to_device(torch.tensor(changed, dtype=torch.int64), logits.device)
                tokens[rows], peaks[rows] = _likeliest_of(logits if len(changed) == len(tokens) else logits[rows])
                is_sound = torch.where(peaks.isfinite(), is_sound, -is_sound)
            if batch.drawn:
                tokens[batch.rows] = _draw(logits, peaks, batch, self._room(len(batch.drawn), logits))
        return torch.stack([tokens, is_sound[:, 0]])

    def fault(self, sequence: Sequence) -> str:
        """Returns why the sequence's grammar can be followed no further, or nothing."""
        state = self._states.get(sequence)
        return state.grammar.fault if state and state.grammar else ""

    def _batch_of(self, sequences: Items[Sequence], device: torch.device) -> SamplingBatch:
        if self._batch is None or self._batch.sequences != list(sequences):
            self._batch = SamplingBatch(sequences, [self._states.get(s) or self._begin(s) for s in sequences], device)
        return self._batch

    def _begin(self, sequence: Sequence) -> SamplingState:
        grammar = sequence.request.grammar
        assert not grammar or self._grammars, "admission refuses what cannot be followed"
        started = self._grammars.start(grammar) if grammar and self._grammars else None
        return self._states.setdefault(sequence, SamplingState(sequence, self._stop_ids, started))

    def _room(self, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        # (R, V) to compute in: on a CPU fresh memory of this size costs more than what is computed in it.
        if self._memory is None or self._memory.shape[0] < num_rows or self._memory.shape[1] != like.shape[1]:
            self._memory = torch.empty(num_rows, like.shape[1], dtype=like.dtype, device=like.device)
        return self._memory[:num_rows]

    def _allowed(self, batch: SamplingBatch) -> dict[int, Words]:
        for row, grammar in batch.grammars.items():
            grammar.follow(batch.sequences[row].output_ids)
        return {row: grammar.allowed for row, grammar in batch.grammars.items()}

    def _active(self, batch: SamplingBatch) -> dict[int, LogitEdits]:
        for row, edits in batch.edited.items():
            grammar = batch.grammars.get(row)
            edits.update(batch.sequences[row].output_ids, grammar is not None and grammar.can_only_end)
        return {row: edits for row, edits in batch.edited.items() if edits.is_active}


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Returns the likeliest token (P,) of each row of `logits` (P, V), the first of equals; NaN is the likeliest of all."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))  # Nine times as fast as torch's.


def _likeliest_of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = likeliest(logits)
    return tokens, logits.gather(1, tokens[:, None])


def _draw(logits: torch.Tensor, peaks: torch.Tensor, batch: SamplingBatch, memory: torch.Tensor) -> torch.Tensor:
    if not batch.is_all:
        logits, peaks = torch.index_select(logits, 0, batch.rows, out=memory), peaks[batch.rows]
    # Below zero before it is divided: a tiny temperature gives minus infinity, and never infinity less infinity.
    scores = torch.sub(logits, peaks, out=memory).mul_(batch.coldness)
    probabilities = torch.softmax(scores, -1, out=memory)  # (R, V)
    levels = batch.levels(logits.device)
    num_whole = len(batch.drawn) - len(batch.cutoffs)
    if not batch.cutoffs:
        return draw(probabilities, levels)
    if logits.device.type != "cpu":
        return draw(torch.cat([probabilities[:num_whole], cut(probabilities[num_whole:], batch.cutoffs)]), levels)
    few = draw_few(probabilities[num_whole:].numpy(), batch.cutoffs, levels[num_whole:].tolist())
    return torch.cat([draw(probabilities[:num_whole], levels[:num_whole]), torch.tensor(few)])
