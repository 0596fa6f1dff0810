"""Logits processors: changes of the logits before a token is sampled. First bias, then `min_tokens`, then penalties.

Only the logits of tokens that a request names or a sequence contains are changed, so the vocabulary is never copied or scanned.

Shapes: P rows, V vocabulary, N changed entries of all rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from lori.device import to_device
from server.engine.request import SamplingParams, Sequence


class TokenCounts:
    """The distinct tokens of a sequence, with their counts in the output. Tokens of the prompt alone have count 0."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._indices = {token: index for index, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.fromiter(self._indices, dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._num_counted = 0

    def update(self, output_ids: Items[int]) -> None:
        """Count the output tokens that are new since the last call."""
        for token in output_ids[self._num_counted :]:
            index = self._indices.setdefault(token, len(self._indices))
            if index == len(self._ids):
                self._grow()
            self._ids[index] = token
            self._counts[index] += 1
        self._num_counted = len(output_ids)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens, each once."""
        return self._ids[: len(self._indices)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """Count of each of `ids` in the output."""
        return self._counts[: len(self._indices)]

    def _grow(self) -> None:
        num_more = max(64, len(self._ids))
        self._ids = np.concatenate([self._ids, np.zeros(num_more, np.int64)])
        self._counts = np.concatenate([self._counts, np.zeros(num_more, np.float32)])


Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Change = Callable[[torch.Tensor], torch.Tensor]
"""Computes the new logits of some entries from the old ones."""

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)


def _fp32(value: float, least: float = -LARGEST) -> np.float32:
    # Clamps a value so that no product or difference of two can be inf - inf or 0 * inf.
    return np.float32(min(max(value, least), LARGEST))


class LogitsProcessors:
    """The logits processors of one sequence, with the state of its output that they need."""

    def __init__(self, sequence: Sequence, stop_ids: Ints) -> None:
        request = sequence.request
        sampling = request.sampling
        self._stop_ids = stop_ids
        self._min_tokens = 0 if sampling.ignore_eos else sampling.min_tokens
        self._num_outputs, self._can_only_end = 0, False
        bias: dict[int, float] = {}
        for token, value in sampling.logit_bias:
            bias[token] = bias.get(token, 0.0) + value
        self.bias_ids = np.fromiter(bias, dtype=np.int64)
        self.bias = np.array([value if value == -np.inf else _fp32(value) for value in bias.values()], dtype=np.float32)
        self.repetition = _fp32(sampling.repetition_penalty, SMALLEST)
        self.presence, self.frequency = _fp32(sampling.presence_penalty), _fp32(sampling.frequency_penalty)
        self.counts = _counts(request.prompt_ids, sampling)

    def update(self, output_ids: Items[int], can_only_end: bool = False) -> None:
        """Note the sequence's output, and whether a grammar allows only stop tokens."""
        self._num_outputs, self._can_only_end = len(output_ids), can_only_end
        if self.counts:
            self.counts.update(output_ids)

    @property
    def can_change(self) -> bool:
        """Whether these processors can change any logit."""
        return bool(len(self.bias_ids)) or self.counts is not None or self._min_tokens > 0

    @property
    def is_active(self) -> bool:
        """Whether these processors change a logit of the next token."""
        return bool(len(self.bias_ids)) or self.counts is not None or self._must_go_on

    @property
    def forbidden_ids(self) -> Ints:
        """The stop tokens while they may not be sampled, else no tokens."""
        return self._stop_ids if self._must_go_on else self._stop_ids[:0]

    @property
    def _must_go_on(self) -> bool:
        return self._num_outputs < self._min_tokens and not self._can_only_end


def _counts(prompt_ids: tuple[int, ...], sampling: SamplingParams) -> TokenCounts | None:
    if sampling.repetition_penalty != 1:
        return TokenCounts(prompt_ids)
    return TokenCounts(()) if sampling.presence_penalty or sampling.frequency_penalty else None


@contextmanager
def processed(logits: torch.Tensor, processors: Mapping[int, LogitsProcessors]) -> Iterator[None]:
    """Apply the `processors` to their rows of `logits` (P, V), contiguous, in place. At the end the rows are restored.

    A logit does not become NaN or plus infinity unless it was before.
    """
    if not processors:
        yield
        return
    flat, undo = logits.view(-1), []
    try:
        for index, change in _changes(processors, logits.shape[1], logits.device):
            before = flat[index]
            undo.append((index, before))
            flat[index] = change(before)
        yield
    finally:
        for index, before in reversed(undo):
            flat[index] = before


def _changes(
    processors: Mapping[int, LogitsProcessors], num_tokens: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, Change]]:
    starts = {row: row * num_tokens for row in processors}
    if biased := {row: p for row, p in processors.items() if len(p.bias_ids)}:
        bias = _upload([p.bias for p in biased.values()], device)
        index = _upload([p.bias_ids + starts[row] for row, p in biased.items()], device)
        yield index, lambda old: (old + bias).clamp_(max=LARGEST)
    if forbidden := [p.forbidden_ids + starts[row] for row, p in processors.items() if len(p.forbidden_ids)]:
        yield _upload(forbidden, device), lambda old: torch.full_like(old, -torch.inf)
    if counted := {row: p.counts.ids + starts[row] for row, p in processors.items() if p.counts}:
        yield _upload(list(counted.values()), device), _penalties([processors[row] for row in counted], device)


def _penalties(processors: Items[LogitsProcessors], device: torch.device) -> Change:
    counts = [p.counts.counts for p in processors if p.counts]
    repetition = _upload([np.full(len(c), p.repetition) for p, c in zip(processors, counts, strict=True)], device)  # (N,)
    penalties = _upload([_additive_penalties(p, c) for p, c in zip(processors, counts, strict=True)], device)  # (N,)

    def change(old: torch.Tensor) -> torch.Tensor:
        repeated = torch.where(old > 0, old / repetition, old * repetition).clamp_(max=LARGEST)
        return repeated.sub_(penalties).clamp_(max=LARGEST)

    return change


def _additive_penalties(processors: LogitsProcessors, counts: Floats) -> Floats:
    with np.errstate(over="ignore"):
        penalty = counts * processors.frequency + (counts > 0) * processors.presence
    return np.clip(penalty, -LARGEST, LARGEST)


def _upload(parts: list[Ints] | list[Floats], device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(np.concatenate(parts)), device)
