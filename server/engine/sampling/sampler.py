"""The sampler: the next tokens of a step, over the whole batch.

Tokens are drawn by inverse CDF over the vocabulary in order of the ids. Each choice of a request has a random stream of its own:
Philox 4x64 with 10 rounds (Salmon et al. 2011), whose raw words NumPy promises to keep, with the key (seed, choice) and the
number of output tokens as counter. So a number depends neither on the rest of the batch nor on earlier draws. Shapes: P rows, R
rows that are drawn, V vocabulary, B blocks of the vocabulary, W width of a block.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from lori.device import to_device
from server.engine.request import Sequence
from server.engine.sampling.grammars import GrammarMasks, Grammars, GrammarState, Words
from server.engine.sampling.logits_processors import LogitEdits, edited
from server.engine.sampling.top_p import Cutoff, cut, draw_few

WIDTH = 128
"""The CDF is one of blocks, then one inside a block: in fp64 over the whole vocabulary it takes ten times as long."""


def draw(probabilities: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the tokens (R,) that `levels` (R,) fp64, in [0, 1), draw from `probabilities` (R, V), which need not sum to one.

    A token without probability is never drawn. What a row that holds no numbers gives is any token.
    """
    num_tokens = probabilities.shape[1]
    missing = -num_tokens % WIDTH
    blocks = (pad(probabilities, (0, missing)) if missing else probabilities).unflatten(1, (-1, WIDTH))  # (R, B, W)
    mass = blocks.sum(-1).double()  # (R, B)
    until = mass.cumsum(-1)
    target = levels[:, None] * until[:, -1:]
    block = _first_above(until, target)  # (R, 1)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, WIDTH))[:, 0].double().cumsum(-1)  # (R, W)
    place = _first_above(inside, target - (until - mass).gather(1, block))
    return (block * WIDTH + place)[:, 0].clamp_(max=num_tokens - 1)


def _first_above(rising: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # Where each row of (R, N) first exceeds its target (R, 1): there it rises, whatever rounding did to the target.
    last = rising[:, -1:]
    target = target.clamp(min=0).minimum(last.nextafter(torch.zeros_like(last)))
    return torch.searchsorted(rising, target, right=True).clamp_(max=rising.shape[1] - 1)


NUM_AHEAD = 64
"""Numbers that are made at once: one costs nearly as much as all of these."""


def uniforms(seed: int, choice: int, position: int, count: int) -> list[float]:
    """Return the `count` numbers in [0, 1) that decide the tokens from `position` on."""
    words = np.random.Philox(key=seed | choice << 64, counter=position).random_raw(4 * count)
    firsts = words[::4]  # of the four that each counter gives
    numbers: list[float] = ((firsts >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers


class RandomStream:
    """The numbers in [0, 1) of one choice, by position; in order they cost the least."""

    def __init__(self, seed: int, choice: int = 0) -> None:
        self._seed, self._choice = seed, choice
        self._first, self._ahead = 0, list[float]()

    def at(self, position: int) -> float:
        """Return the number that decides token `position` of the output."""
        if not self._first <= position < self._first + len(self._ahead):
            self._first, self._ahead = position, uniforms(self._seed, self._choice, position, NUM_AHEAD)
        return self._ahead[position - self._first]


TEMPERATURES = (1e-30, 1e30)
"""Beyond these nothing changes but that fp32 overflows."""


class SamplingState:
    """What is kept of one sequence from step to step. It does not hold the sequence, with which it ends."""

    def __init__(self, sequence: Sequence, stop_ids: NDArray[np.int64], grammar: GrammarState | None = None) -> None:
        sampling = sequence.request.sampling
        self.stream = RandomStream(sampling.seed, sequence.choice)
        self.cutoff = Cutoff.of(sampling)
        self.temperature = sampling.temperature if sampling.top_k != 1 else 0.0  # Of one token there is nothing to draw.
        self.edits = LogitEdits(sequence, stop_ids)
        self.grammar = grammar


class SamplingBatch:
    """What depends on nothing but which sequences share a step: mostly the same ones as the step before.

    The rows that are drawn stand in order: those without a cutoff first.
    """

    def __init__(self, sequences: Items[Sequence], states: Items[SamplingState], device: torch.device) -> None:
        self.sequences, self.states = list(sequences), list(states)
        self.grammars = {row: state.grammar for row, state in enumerate(states) if state.grammar}
        self.edited = {row: state.edits for row, state in enumerate(states) if state.edits.can_change}
        drawn = [row for row, state in enumerate(states) if state.temperature]
        self.drawn = sorted(drawn, key=lambda row: not states[row].cutoff.is_none)
        self.cutoffs = [c for row in self.drawn if not (c := states[row].cutoff).is_none]
        self.rows = to_device(torch.tensor(self.drawn, dtype=torch.int64), device)  # (R,)
        self.is_all = self.drawn == list(range(len(states)))
        low, high = TEMPERATURES
        coldness = [1 / min(max(states[row].temperature, low), high) for row in self.drawn]
        self.coldness = to_device(torch.tensor(coldness, dtype=torch.float32), device)[:, None]  # (R, 1)

    def levels(self, device: torch.device) -> torch.Tensor:
        """Return the random numbers (R,) fp64 that decide the next tokens."""
        numbers = [self.states[row].stream.at(len(self.sequences[row].output_ids)) for row in self.drawn]
        return to_device(torch.tensor(numbers, dtype=torch.float64), device)


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
        """Pick the next token of each sequence from its row of `logits` (P, V), fp32 and contiguous, which stay the same.

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
        """Return why the sequence's grammar can be followed no further, or nothing."""
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
    """Return the likeliest token (P,) of each row of `logits` (P, V), the first of equals; NaN is the likeliest of all."""
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
