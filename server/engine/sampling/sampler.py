"""The sampler: samples the next tokens of a step, over the whole batch.

Tokens are drawn by inverse CDF over the vocabulary, in the order of the ids. Each choice of a request has its own random stream:
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
from server.engine.sampling.grammars import Bitmask, GrammarMasks, Grammars, GrammarState
from server.engine.sampling.logits_processors import LogitsProcessors, processed
from server.engine.sampling.top_p import Cutoff, apply_cutoffs, draw_candidates

WIDTH = 128
"""Width of a block of the vocabulary. The CDF is computed over blocks, then within one block: over the whole vocabulary in fp64
it takes ten times as long."""


def draw(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the tokens (R,) that `uniforms` (R,) fp64, in [0, 1), draw from `probabilities` (R, V), which need not sum to one.

    A token of probability zero is never drawn. A row with NaN gives an arbitrary token.
    """
    num_tokens = probabilities.shape[1]
    padding = -num_tokens % WIDTH
    blocks = (pad(probabilities, (0, padding)) if padding else probabilities).unflatten(1, (-1, WIDTH))  # (R, B, W)
    mass = blocks.sum(-1).double()  # (R, B)
    cumulative = mass.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, target)  # (R, 1)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, WIDTH))[:, 0].double().cumsum(-1)  # (R, W)
    offset = _first_above(inside, target - (cumulative - mass).gather(1, block))
    return (block * WIDTH + offset)[:, 0].clamp_(max=num_tokens - 1)


def _first_above(rising: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # Where each row of (R, N) first exceeds its target (R, 1). The CDF rises there, whatever rounding did to the target.
    last = rising[:, -1:]
    target = target.clamp(min=0).minimum(last.nextafter(torch.zeros_like(last)))
    return torch.searchsorted(rising, target, right=True).clamp_(max=rising.shape[1] - 1)


NUM_AHEAD = 64
"""Number of random numbers to compute at once: a single one costs nearly as much."""


def uniform_numbers(seed: int, choice: int, position: int, count: int) -> list[float]:
    """Return the `count` numbers in [0, 1) that draw the tokens from `position` on."""
    words = np.random.Philox(key=seed | choice << 64, counter=position).random_raw(4 * count)
    firsts = words[::4]  # the first of the four words of each counter
    numbers: list[float] = ((firsts >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers


class RandomStream:
    """The random numbers in [0, 1) of one choice, by position. Cheapest in ascending order."""

    def __init__(self, seed: int, choice: int = 0) -> None:
        self._seed, self._choice = seed, choice
        self._start, self._ahead = 0, list[float]()

    def at(self, position: int) -> float:
        """Return the number that draws token `position` of the output."""
        if not self._start <= position < self._start + len(self._ahead):
            self._start, self._ahead = position, uniform_numbers(self._seed, self._choice, position, NUM_AHEAD)
        return self._ahead[position - self._start]


TEMPERATURES = (1e-30, 1e30)
"""Range of temperatures. Beyond it nothing changes, except that fp32 overflows."""


class SamplingState:
    """The sampling state of one sequence between steps. Has no reference to the sequence, and is freed with it."""

    def __init__(self, sequence: Sequence, stop_ids: NDArray[np.int64], grammar: GrammarState | None = None) -> None:
        sampling = sequence.request.sampling
        self.stream = RandomStream(sampling.seed, sequence.choice)
        self.cutoff = Cutoff.from_sampling(sampling)
        self.temperature = sampling.temperature if sampling.top_k != 1 else 0.0  # with a single token there is nothing to draw
        self.processors = LogitsProcessors(sequence, stop_ids)
        self.grammar = grammar


class SamplingBatch:
    """The sampling tensors that depend only on the sequences of a step, which are mostly those of the last step.

    `drawn_rows` lists the rows without a cutoff first.
    """

    def __init__(self, sequences: Items[Sequence], states: Items[SamplingState], device: torch.device) -> None:
        self.sequences, self.states = list(sequences), list(states)
        self.grammars = {row: state.grammar for row, state in enumerate(states) if state.grammar}
        self.processors = {row: state.processors for row, state in enumerate(states) if state.processors.can_change}
        drawn_rows = [row for row, state in enumerate(states) if state.temperature]
        self.drawn_rows = sorted(drawn_rows, key=lambda row: not states[row].cutoff.is_none)
        self.cutoffs = [c for row in self.drawn_rows if not (c := states[row].cutoff).is_none]
        self.rows = to_device(torch.tensor(self.drawn_rows, dtype=torch.int64), device)  # (R,)
        self.is_all_drawn = self.drawn_rows == list(range(len(states)))
        low, high = TEMPERATURES
        inverse_temperatures = [1 / min(max(states[row].temperature, low), high) for row in self.drawn_rows]
        self.inverse_temperatures = to_device(torch.tensor(inverse_temperatures, dtype=torch.float32), device)[:, None]  # (R, 1)

    def uniforms(self, device: torch.device) -> torch.Tensor:
        """Return the random numbers (R,) fp64 that draw the next tokens."""
        numbers = [self.states[row].stream.at(len(self.sequences[row].output_ids)) for row in self.drawn_rows]
        return to_device(torch.tensor(numbers, dtype=torch.float64), device)


class Sampler:
    """The sampler. Keeps the sampling state of each sequence as long as the sequence lives.

    `stop_ids` are the tokens that `min_tokens` forbids. `grammars` compiles the requests' grammars.
    """

    def __init__(self, stop_ids: Iterable[int], grammars: Grammars | None = None) -> None:
        self._stop_ids, self._grammars = np.array(sorted(stop_ids), dtype=np.int64), grammars
        self._states: WeakKeyDictionary[Sequence, SamplingState] = WeakKeyDictionary()
        self._batch: SamplingBatch | None = None
        self._memory: torch.Tensor | None = None
        self._masks = GrammarMasks()

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
        """Sample the next token of each sequence from its row of `logits` (P, V), fp32 and contiguous. The logits do not change.

        Returns the tokens and the rows' validity as a tensor (2, P) int64 on the logits' device, without waiting for the device.
        Validity is 1, or 0 for a row with NaN or infinity, or -1 for a row without any allowed token. The token of an invalid row
        has no meaning.
        """
        batch = self._batch_of(sequences, logits.device)
        tokens = likeliest(logits)
        peaks = logits.gather(1, tokens[:, None])  # (P, 1)
        is_valid = peaks.isfinite().long()
        allowed = self._allowed(batch)
        processors = self._active(batch)
        with processed(logits, processors), self._masks.masked(logits, allowed):
            if changed := sorted({*processors, *allowed}):
                rows = to_device(torch.tensor(changed, dtype=torch.int64), logits.device)
                tokens[rows], peaks[rows] = _likeliest_of(logits if len(changed) == len(tokens) else logits[rows])
                is_valid = torch.where(peaks.isfinite(), is_valid, -is_valid)
            if batch.drawn_rows:
                tokens[batch.rows] = _draw_rows(logits, peaks, batch, self._scratch(len(batch.drawn_rows), logits))
        return torch.stack([tokens, is_valid[:, 0]])

    def fault(self, sequence: Sequence) -> str:
        """Return the reason why the sequence's grammar cannot be followed further; empty if it can."""
        state = self._states.get(sequence)
        return state.grammar.fault if state and state.grammar else ""

    def _batch_of(self, sequences: Items[Sequence], device: torch.device) -> SamplingBatch:
        if self._batch is None or self._batch.sequences != list(sequences):
            self._batch = SamplingBatch(sequences, [self._states.get(s) or self._begin(s) for s in sequences], device)
        return self._batch

    def _begin(self, sequence: Sequence) -> SamplingState:
        grammar = sequence.request.sampling.grammar
        assert not grammar or self._grammars, "admission refuses what cannot be followed"
        state = self._grammars.start(grammar) if grammar and self._grammars else None
        return self._states.setdefault(sequence, SamplingState(sequence, self._stop_ids, state))

    def _scratch(self, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        # (R, V) working memory: on a CPU, allocating this much costs more than using it.
        if self._memory is None or self._memory.shape[0] < num_rows or self._memory.shape[1] != like.shape[1]:
            self._memory = torch.empty(num_rows, like.shape[1], dtype=like.dtype, device=like.device)
        return self._memory[:num_rows]

    def _allowed(self, batch: SamplingBatch) -> dict[int, Bitmask]:
        for row, grammar in batch.grammars.items():
            grammar.follow(batch.sequences[row].output_ids)
        return {row: grammar.allowed for row, grammar in batch.grammars.items()}

    def _active(self, batch: SamplingBatch) -> dict[int, LogitsProcessors]:
        for row, processors in batch.processors.items():
            grammar = batch.grammars.get(row)
            processors.update(batch.sequences[row].output_ids, grammar is not None and grammar.can_only_end)
        return {row: processors for row, processors in batch.processors.items() if processors.is_active}


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Return the most likely token (P,) of each row of `logits` (P, V). The first of equals; NaN is the most likely of all."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))  # nine times as fast as torch's


def _likeliest_of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = likeliest(logits)
    return tokens, logits.gather(1, tokens[:, None])


def _draw_rows(logits: torch.Tensor, peaks: torch.Tensor, batch: SamplingBatch, memory: torch.Tensor) -> torch.Tensor:
    if not batch.is_all_drawn:
        logits, peaks = torch.index_select(logits, 0, batch.rows, out=memory), peaks[batch.rows]
    # The peak is subtracted before the division: a tiny temperature then gives minus infinity, but never inf - inf.
    scores = torch.sub(logits, peaks, out=memory).mul_(batch.inverse_temperatures)
    probabilities = torch.softmax(scores, -1, out=memory)  # (R, V)
    uniforms = batch.uniforms(logits.device)
    num_whole = len(batch.drawn_rows) - len(batch.cutoffs)
    if not batch.cutoffs:
        return draw(probabilities, uniforms)
    if logits.device.type != "cpu":
        return draw(torch.cat([probabilities[:num_whole], apply_cutoffs(probabilities[num_whole:], batch.cutoffs)]), uniforms)
    tokens = draw_candidates(probabilities[num_whole:].numpy(), batch.cutoffs, uniforms[num_whole:].tolist())
    return torch.cat([draw(probabilities[:num_whole], uniforms[:num_whole]), torch.tensor(tokens)])
