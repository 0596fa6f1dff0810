"""One step's tensors and output: logits, sampled tokens, log-probabilities, and the replies made of them.

Log-probabilities are those of the unmodified logits: before bias, penalties, temperature and top-p. Shapes: P positions whose
logits are needed, V vocabulary, N alternatives.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from tokenizers import Tokenizer

from lori.device import to_device
from server.engine.model.runner import Runner
from server.engine.request import Chunk, DoneEvent, Event, FinishReason, Sequence, TextEvent, Timings, TokenLogprob
from server.engine.sampling.sampler import Sampler
from server.engine.scheduling.kv_cache import needs_prompt_logprobs
from server.engine.text import TextStream, token_text


class Stopwatch:
    """A stopwatch that starts when a sequence is submitted and records its first step and its first token."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._submitted = clock, clock()
        self._started: float | None = None
        self._first_token: float | None = None

    def begin(self) -> None:
        """Note that the sequence is in a step. Only the first call counts."""
        if self._started is None:
            self._started = self._clock()

    def note_token(self) -> None:
        """Note that the sequence has a new token. Only the first call counts."""
        if self._first_token is None:
            self._first_token = self._clock()

    def stop(self) -> Timings:
        """Return the time spent in the queue, in prefill and in decode until now."""
        now = self._clock()
        started = now if self._started is None else self._started
        first_token = now if self._first_token is None else self._first_token
        return Timings(queue=started - self._submitted, prefill=first_token - started, decode=now - first_token)


Emit = Callable[[Event], None]
Logprobs = tuple[float, Mapping[int, float]]
"""A token's log-probability, and those of the most likely tokens by id."""


@dataclass(slots=True)
class Reply:
    """One sequence's reply while it is generated. Turns tokens into text events and sends them with `emit`."""

    sequence: Sequence
    emit: Emit
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    stopwatch: Stopwatch
    text: TextStream = field(init=False)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _num_prompt_logprobs: int = 0
    _has_emitted_prompt: bool = False

    def __post_init__(self) -> None:
        request, sampling = self.sequence.request, self.sequence.request.sampling
        self.text = TextStream(
            self.tokenizer, request.prompt_ids, sampling.stop, sampling.min_tokens, include_stop=sampling.include_stop
        )

    def prompt_logprobs(self, start: int, logprobs: Items[Logprobs]) -> list[TokenLogprob]:
        """Return the log-probabilities of the prompt's tokens from `start` on, without the tokens that were added before."""
        request = self.sequence.request
        rows: list[tuple[int, float | None, Mapping[int, float]]] = [(0, None, {})]  # nothing predicts the first token
        rows += [(position, value, top) for position, (value, top) in enumerate(logprobs, start)]
        ids, offsets, num_noted = request.prompt_ids, request.prompt_offsets, self._num_prompt_logprobs
        return [
            self._logprob(ids[position], offsets[position], value, top) for position, value, top in rows if position >= num_noted
        ]

    def add_prompt_logprobs(self, logprobs: Items[TokenLogprob]) -> None:
        """Add log-probabilities of the prompt's next tokens to the reply. All choices of a request share them."""
        self._logprobs += logprobs
        self._num_prompt_logprobs += len(logprobs)

    def emit_prompt(self) -> None:
        """Emit the prompt's text, if it is to be echoed, and the log-probabilities computed so far. The text is emitted once."""
        request = self.sequence.request
        text = request.prompt_text if request.sampling.echo and not self._has_emitted_prompt else ""
        self._has_emitted_prompt = True
        if text or self._logprobs:
            self._emit_text(text, is_prompt=True)

    def add_token(self, token: int, logprobs: Logprobs | None) -> FinishReason | None:
        """Emit the text that the sequence's newest token completes. Return the finish reason, or None if the reply goes on.

        The token must already be in `sequence.output_ids`.
        """
        request, sampling = self.sequence.request, self.sequence.request.sampling
        self.stopwatch.note_token()
        if logprobs is not None:
            offset = (len(request.prompt_text) if sampling.echo else 0) + self.text.num_characters
            alternatives = dict([*logprobs[1].items()][: sampling.num_logprobs])
            self._logprobs.append(self._logprob(token, offset, logprobs[0], alternatives))
        if token in self.stop_ids and not sampling.ignore_eos:
            return "stop"
        # Emitted even if the text is empty, so that a client sees progress.
        self._emit_text(self.text.push(token), is_prompt=False)
        if self.text.is_stopped:
            return "stop_sequence"
        return "length" if len(self.sequence.output_ids) == request.max_tokens else None

    def finish(self, reason: FinishReason) -> None:
        """Emit the remaining text and the event that ends the reply."""
        sequence = self.sequence
        text = "" if reason == "cancelled" else self.text.flush()
        if text or self._logprobs:
            self._emit_text(text, is_prompt=not sequence.output_ids)
        num_prompt = len(sequence.request.prompt_ids)
        num_output, timings = len(sequence.output_ids), self.stopwatch.stop()
        self.emit(DoneEvent(reason, num_prompt, num_output, sequence.choice, sequence.num_cached, timings))

    def _emit_text(self, text: str, is_prompt: bool) -> None:
        self.emit(TextEvent(text, tuple(self._logprobs), is_prompt, self.sequence.choice))
        self._logprobs.clear()

    def _logprob(self, token: int, offset: int, value: float | None, top: Mapping[int, float]) -> TokenLogprob:
        alternatives: dict[str, float] = {}
        for other, other_value in top.items():  # the most likely first: it stays if several tokens have the same text
            alternatives.setdefault(token_text(self.tokenizer, other), other_value)
        return TokenLogprob(token_text(self.tokenizer, token), offset, value, alternatives)


def read_back(tensors: Items[torch.Tensor]) -> list[list[list[float]]]:
    """Return the rows of each of these (P, N) tensors, all on one device, as lists. Integers are exact up to 2**53.

    Waits for the device once, or not at all if every tensor is empty.
    """
    parts = [tensor.reshape(-1).double() for tensor in tensors if tensor.numel()]
    numbers: list[float] = torch.cat(parts).tolist() if parts else []
    results, offset = [], 0
    for tensor in tensors:
        num_rows, width = tensor.shape
        results.append([numbers[offset + row * width : offset + (row + 1) * width] for row in range(num_rows)])
        offset += num_rows * width
    return results


def are_valid(logits: torch.Tensor) -> torch.Tensor:
    """Return (P,) bool: whether a row of `logits` (P, V) has no NaN, no plus infinity, and at least one possible token."""
    return logits.amax(-1).isfinite()


def gather_logprobs(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> torch.Tensor:
    """Return the log-probabilities (P, 1 + 2 N) fp64 for `logits` (P, V) and `tokens` (P,) int64, without waiting for the device.

    A row is the token's log-probability, those of the `num_top` most likely tokens, and the ids of these tokens.
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None])
    if not num_top:
        return chosen.double()
    values, ids = logprobs.topk(num_top, dim=-1)
    return torch.cat([chosen.double(), values.double(), ids.double()], 1)


def to_logprobs(rows: Items[Items[float]]) -> list[Logprobs]:
    """Return the rows of `gather_logprobs`, already read back from the device, as log-probabilities."""
    half = len(rows[0]) // 2 if rows else 0
    return [(row[0], dict(zip(map(int, row[1 + half :]), row[1 : 1 + half], strict=True))) for row in rows]


NOTHING_LEFT = "what the request forbids leaves no token"


@dataclass(frozen=True, slots=True)
class ChunkOutput:
    """The output of one chunk: the next token if the chunk is its sequence's last, and the log-probabilities asked for."""

    chunk: Chunk
    token: int | None
    is_valid: bool
    """False if the logits overflow, or if the request's constraints leave no token. Then only `fault` has a meaning."""
    prompt_logprobs: Items[Logprobs]
    logprobs: Logprobs | None
    fault: str = ""
    """The reason why the request's constraints leave no token; empty otherwise."""


class StepExecutor:
    """The computation of steps. It changes no sequence, so a step that fails may be tried again in parts."""

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        self.runner, self._sampler = runner, sampler

    def compute(self, chunks: Items[Chunk]) -> list[ChunkOutput]:
        """Return the output of every chunk. Waits for the device once, at the end."""
        spans = [_logit_rows(chunk) for chunk in chunks]
        starts = accumulate((chunk.stop - chunk.start for chunk in chunks), initial=0)
        positions = [start + row for start, span in zip(starts, spans, strict=False) for row in span]
        logits = self.runner.forward(chunks, positions)
        parts = dict(zip(chunks, logits.split([len(span) for span in spans]), strict=True))
        last = [chunk for chunk in chunks if chunk.is_last]
        # Most steps need one row of each chunk. Then the logits are the rows to sample from.
        rows = logits if len(last) == len(positions) else torch.stack([parts[c][-1] for c in last]) if last else logits[:0]
        sampled = self._sampler.sample(rows, [chunk.sequence for chunk in last])
        logprob_rows = [row for row, chunk in enumerate(last) if chunk.sequence.request.sampling.num_logprobs is not None]
        prompt_chunks = [chunk for chunk in chunks if needs_prompt_logprobs(chunk.sequence)]
        prompt_tensors = [_prompt_logprobs(chunk, parts[chunk]) for chunk in prompt_chunks]
        samples, output_rows, *prompt_rows = read_back(
            [sampled, _output_logprobs(rows, sampled[0], last, logprob_rows), *prompt_tensors]
        )
        tokens = {c: (int(token), int(is_valid)) for c, token, is_valid in zip(last, *samples, strict=True)}
        faults = {c: self._sampler.fault(c.sequence) or NOTHING_LEFT for c, (_, is_valid) in tokens.items() if is_valid < 0}
        output_logprobs = dict(zip((last[row] for row in logprob_rows), to_logprobs(output_rows), strict=True))
        prompt_logprobs = dict(zip(prompt_chunks, prompt_rows, strict=True))
        outputs = [_chunk_output(c, tokens.get(c, (None, 1)), prompt_logprobs.get(c, ()), output_logprobs.get(c)) for c in chunks]
        return [replace(o, fault=faults[o.chunk]) if o.chunk in faults else o for o in outputs]


def _chunk_output(
    chunk: Chunk, sampled: tuple[int | None, int], prompt_rows: Items[Items[float]], logprobs: Logprobs | None
) -> ChunkOutput:
    # The first value of a prompt row says whether the row is valid.
    token, validity = sampled
    is_valid = validity > 0 and all(row[0] for row in prompt_rows)
    return ChunkOutput(chunk, token, is_valid, to_logprobs([row[1:] for row in prompt_rows]) if is_valid else (), logprobs)


def _logit_rows(chunk: Chunk) -> range:
    # The rows of the chunk whose logits are needed: those that predict a prompt token, and the row to sample from.
    last = chunk.stop - chunk.start - 1
    if not needs_prompt_logprobs(chunk.sequence):
        return range(last, last + 1) if chunk.is_last else range(0)
    num_prompt_rows = min(chunk.stop, len(chunk.sequence.request.prompt_ids) - 1) - chunk.start
    return range(last + 1 if chunk.is_last else num_prompt_rows)


def _prompt_logprobs(chunk: Chunk, logits: torch.Tensor) -> torch.Tensor:
    # For each prompt token that the chunk's logits predict: whether the row is valid, and its `gather_logprobs`.
    request = chunk.sequence.request
    targets = request.prompt_ids[chunk.start + 1 : chunk.stop + 1]
    assert request.sampling.num_logprobs is not None
    rows = logits[: len(targets)]
    tokens = to_device(torch.tensor(targets, dtype=torch.int64), logits.device)
    return torch.cat([are_valid(rows)[:, None].double(), gather_logprobs(rows, tokens, request.sampling.num_logprobs)], 1)


def _output_logprobs(logits: torch.Tensor, tokens: torch.Tensor, chunks: Items[Chunk], wanted_rows: Items[int]) -> torch.Tensor:
    # Only `wanted_rows` get log-probabilities.
    if not wanted_rows:
        return logits[:0]
    num_top = max(chunks[row].sequence.request.sampling.num_logprobs or 0 for row in wanted_rows)
    if len(wanted_rows) == len(chunks):
        return gather_logprobs(logits, tokens, num_top)
    rows = to_device(torch.tensor(wanted_rows, dtype=torch.int64), logits.device)
    return gather_logprobs(logits[rows], tokens[rows], num_top)
