"""What requests change in their logits before a token is picked: bias, then `min_tokens`, then penalties.

Only the tokens that a request names or a sequence holds are touched, so the whole vocabulary is neither copied nor passed over.

Shapes: P rows, V vocabulary, N edited entries of all rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from lori.device import to_device
from server.engine.request import Sampling, Sequence


class TokenCounts:
    """The distinct tokens of a sequence, and how often each is in the output; those of the prompt alone are there with 0."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.fromiter(self._places, dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._num_counted = 0

    def update(self, output_ids: Items[int]) -> None:
        """Count what the output has more than at the last call."""
        for token in output_ids[self._num_counted :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._grow()
            self._ids[place] = token
            self._counts[place] += 1
        self._num_counted = len(output_ids)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens, each once."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` is in the output."""
        return self._counts[: len(self._places)]

    def _grow(self) -> None:
        num_more = max(64, len(self._ids))
        self._ids = np.concatenate([self._ids, np.zeros(num_more, np.int64)])
        self._counts = np.concatenate([self._counts, np.zeros(num_more, np.float32)])


Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Change = Callable[[torch.Tensor], torch.Tensor]
"""From the entries as they were to what they become."""

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)


def _fp32(value: float, least: float = -LARGEST) -> np.float32:
    # Into a range where neither a product nor a difference of two can be infinity less infinity, or zero times infinity.
    return np.float32(min(max(value, least), LARGEST))


class LogitEdits:
    """What one sequence's request changes in its row, and what this needs to know of its output."""

    def __init__(self, sequence: Sequence, stop_ids: Ints) -> None:
        request = sequence.request
        sampling = request.sampling
        self._stop_ids = stop_ids
        self._min_tokens = 0 if request.ignore_eos else sampling.min_tokens
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
        """Note what the output has more than at the last call, and whether a grammar leaves nothing but stop tokens."""
        self._num_outputs, self._can_only_end = len(output_ids), can_only_end
        if self.counts:
            self.counts.update(output_ids)

    @property
    def can_change(self) -> bool:
        """Whether it ever changes anything."""
        return bool(len(self.bias_ids)) or self.counts is not None or self._min_tokens > 0

    @property
    def is_active(self) -> bool:
        """Whether it changes anything in the next token's row."""
        return bool(len(self.bias_ids)) or self.counts is not None or self._must_go_on

    @property
    def forbidden_ids(self) -> Ints:
        """The stop tokens, as long as they are not to be picked."""
        return self._stop_ids if self._must_go_on else self._stop_ids[:0]

    @property
    def _must_go_on(self) -> bool:
        return self._num_outputs < self._min_tokens and not self._can_only_end


def _counts(prompt_ids: tuple[int, ...], sampling: Sampling) -> TokenCounts | None:
    if sampling.repetition_penalty != 1:
        return TokenCounts(prompt_ids)
    return TokenCounts(()) if sampling.presence_penalty or sampling.frequency_penalty else None


@contextmanager
def edited(logits: torch.Tensor, edits: Mapping[int, LogitEdits]) -> Iterator[None]:
    """Change the rows of `logits` (P, V), contiguous, that `edits` names, in place; at the end all is as it was.

    Nothing becomes NaN or plus infinity that was not.
    """
    if not edits:
        yield
        return
    flat, undo = logits.view(-1), []
    try:
        for index, change in _changes(edits, logits.shape[1], logits.device):
            before = flat[index]
            undo.append((index, before))
            flat[index] = change(before)
        yield
    finally:
        for index, before in reversed(undo):
            flat[index] = before


def _changes(edits: Mapping[int, LogitEdits], num_tokens: int, device: torch.device) -> Iterator[tuple[torch.Tensor, Change]]:
    starts = {row: row * num_tokens for row in edits}
    if biased := {row: e for row, e in edits.items() if len(e.bias_ids)}:
        bias = _upload([e.bias for e in biased.values()], device)
        index = _upload([e.bias_ids + starts[row] for row, e in biased.items()], device)
        yield index, lambda old: (old + bias).clamp_(max=LARGEST)
    if forbidden := [e.forbidden_ids + starts[row] for row, e in edits.items() if len(e.forbidden_ids)]:
        yield _upload(forbidden, device), lambda old: torch.full_like(old, -torch.inf)
    if counted := {row: e.counts.ids + starts[row] for row, e in edits.items() if e.counts}:
        yield _upload(list(counted.values()), device), _penalties([edits[row] for row in counted], device)


def _penalties(edits: Items[LogitEdits], device: torch.device) -> Change:
    counts = [e.counts.counts for e in edits if e.counts]
    repetition = _upload([np.full(len(c), e.repetition) for e, c in zip(edits, counts, strict=True)], device)  # (N,)
    taken = _upload([_taken(e, c) for e, c in zip(edits, counts, strict=True)], device)  # (N,)

    def change(old: torch.Tensor) -> torch.Tensor:
        repeated = torch.where(old > 0, old / repetition, old * repetition).clamp_(max=LARGEST)
        return repeated.sub_(taken).clamp_(max=LARGEST)

    return change


def _taken(edits: LogitEdits, counts: Floats) -> Floats:
    with np.errstate(over="ignore"):
        taken = counts * edits.frequency + (counts > 0) * edits.presence
    return np.clip(taken, -LARGEST, LARGEST)


def _upload(parts: list[Ints] | list[Floats], device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(np.concatenate(parts)), device)
