"""One step's tensors and output: logits, sampled tokens, log-probabilities, and the replies made of them.

Log-probabilities are the model's own: before bias, penalties, temperature and top-p. Shapes: P positions whose logits are
wanted, V vocabulary, N alternatives.
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
from server.engine.scheduling.kv_cache import must_score
from server.engine.text import TextStream, token_text


class Stopwatch:
    """Runs from when a sequence is submitted; hears when it first runs, and when it has tokens."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._submitted = clock, clock()
        self._begun: float | None = None
        self._first: float | None = None

    def begin(self) -> None:
        """Note that the sequence is in a step; the first counts."""
        if self._begun is None:
            self._begun = self._clock()

    def note_token(self) -> None:
        """Note that the sequence has a token; the first counts."""
        if self._first is None:
            self._first = self._clock()

    def stop(self) -> Timings:
        """Return where the time went until now."""
        now = self._clock()
        begun = now if self._begun is None else self._begun
        first = now if self._first is None else self._first
        return Timings(queue=begun - self._submitted, prefill=first - begun, decode=now - first)


Emit = Callable[[Event], None]
Score = tuple[float, Mapping[int, float]]
"""A token's log-probability, and those of the likeliest ones."""


@dataclass(slots=True)
class Reply:
    """One sequence's answer as it comes. It hears of every token and says what to tell."""

    sequence: Sequence
    emit: Emit
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    stopwatch: Stopwatch
    text: TextStream = field(init=False)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _num_scored: int = 0
    _has_begun: bool = False

    def __post_init__(self) -> None:
        request = self.sequence.request
        self.text = TextStream(
            self.tokenizer,
            request.prompt_ids,
            request.stop,
            request.sampling.min_tokens,
            include_stop=request.include_stop,
        )

    def prompt_logprobs(self, start: int, scores: Items[Score]) -> list[TokenLogprob]:
        """Return what is told of the prompt's tokens from `start` on, but of those that were noted before."""
        request = self.sequence.request
        found: list[tuple[int, float | None, Mapping[int, float]]] = [(0, None, {})]  # which nothing predicts
        found += [(place, value, top) for place, (value, top) in enumerate(scores, start)]
        ids, offsets, num_known = request.prompt_ids, request.prompt_offsets, self._num_scored
        return [self._logprob(ids[place], offsets[place], value, top) for place, value, top in found if place >= num_known]

    def note_prompt(self, logprobs: Items[TokenLogprob]) -> None:
        """Note what comes next of the prompt's tokens; all choices of a request share it."""
        self._logprobs += logprobs
        self._num_scored += len(logprobs)

    def begin(self) -> None:
        """Tell the prompt, where it is to be echoed, and the scores of what was computed of it; the prompt once."""
        text = self.sequence.request.prompt_text if self.sequence.request.echo and not self._has_begun else ""
        self._has_begun = True
        if text or self._logprobs:
            self._tell(text, is_prompt=True)

    def take(self, token: int, score: Score | None) -> FinishReason | None:
        """Tell the text that the sequence's next token, already among its own, makes sure; returns why it is over, if it is."""
        request = self.sequence.request
        self.stopwatch.note_token()
        if score is not None:
            offset = (len(request.prompt_text) if request.echo else 0) + self.text.num_characters
            few = dict([*score[1].items()][: request.num_logprobs])
            self._logprobs.append(self._logprob(token, offset, score[0], few))
        if token in self.stop_ids and not request.ignore_eos:
            return "stop"
        # Told even where no text is sure yet: a client sees that it goes on.
        self._tell(self.text.push(token), is_prompt=False)
        if self.text.is_stopped:
            return "stop_sequence"
        return "length" if len(self.sequence.output_ids) == request.max_tokens else None

    def end(self, reason: FinishReason) -> None:
        """Tell what is left, and that the answer is over."""
        sequence = self.sequence
        text = "" if reason == "cancelled" else self.text.flush()
        if text or self._logprobs:
            self._tell(text, is_prompt=not sequence.output_ids)
        num_prompt = len(sequence.request.prompt_ids)
        num_output, timings = len(sequence.output_ids), self.stopwatch.stop()
        self.emit(DoneEvent(reason, num_prompt, num_output, sequence.choice, sequence.num_cached, timings))

    def _tell(self, text: str, is_prompt: bool) -> None:
        self.emit(TextEvent(text, tuple(self._logprobs), is_prompt, self.sequence.choice))
        self._logprobs.clear()

    def _logprob(self, token: int, offset: int, value: float | None, top: Mapping[int, float]) -> TokenLogprob:
        alike: dict[str, float] = {}
        for other, score in top.items():  # the likeliest first: of tokens that look the same it stays
            alike.setdefault(token_text(self.tokenizer, other), score)
        return TokenLogprob(token_text(self.tokenizer, token), offset, value, alike)


def read_back(tensors: Items[torch.Tensor]) -> list[list[list[float]]]:
    """Return the rows of each of these (P, N) tensors of one device; integers up to 2**53 are exact.

    It waits for the device once, and not at all where there is nothing in them.
    """
    parts = [tensor.reshape(-1).double() for tensor in tensors if tensor.numel()]
    numbers: list[float] = torch.cat(parts).tolist() if parts else []
    found, at = [], 0
    for tensor in tensors:
        num_rows, width = tensor.shape
        found.append([numbers[at + row * width : at + (row + 1) * width] for row in range(num_rows)])
        at += num_rows * width
    return found


def are_sound(logits: torch.Tensor) -> torch.Tensor:
    """Return (P,) bool: whether a row of `logits` (P, V) holds neither NaN nor plus infinity, and a token that is possible."""
    return logits.amax(-1).isfinite()


def score(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> torch.Tensor:
    """Return (P, 1 + 2 N) fp64 for `logits` (P, V) and `tokens` (P,) int64, and does not wait for their device.

    A row is its token's log-probability, those of the `num_top` likeliest tokens, and these tokens.
    """
    scores = logits.log_softmax(-1)
    own = scores.gather(1, tokens[:, None])
    if not num_top:
        return own.double()
    values, ids = scores.topk(num_top, dim=-1)
    return torch.cat([own.double(), values.double(), ids.double()], 1)


def to_scores(rows: Items[Items[float]]) -> list[Score]:
    """Return what the rows of `score` say, once they are plain numbers."""
    half = len(rows[0]) // 2 if rows else 0
    return [(row[0], dict(zip(map(int, row[1 + half :]), row[1 : 1 + half], strict=True))) for row in rows]


NOTHING_LEFT = "what the request forbids leaves no token"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step made of a chunk: the next token where it is the last, and the scores that were asked for."""

    chunk: Chunk
    token: int | None
    is_sound: bool
    """False where the model's numbers overflow, or what the request asks for leaves no token: then only `fault` has a meaning."""
    prompt_scores: Items[Score]
    score: Score | None
    fault: str = ""
    """Why the request leaves no token, where that is it."""


class Turn:
    """Computes steps. It changes no sequence, so a step that fails may be tried again, in parts."""

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        self.runner, self._sampler = runner, sampler

    def compute(self, chunks: Items[Chunk]) -> list[Outcome]:
        """Return the outcome of every chunk. It waits for the device once, at the end."""
        spans = [_wanted(chunk) for chunk in chunks]
        starts = accumulate((chunk.stop - chunk.start for chunk in chunks), initial=0)
        positions = [start + row for start, span in zip(starts, spans, strict=False) for row in span]
        logits = self.runner.forward(chunks, positions)
        parts = dict(zip(chunks, logits.split([len(span) for span in spans]), strict=True))
        last = [chunk for chunk in chunks if chunk.is_last]
        # Most steps want one row of each chunk: then the logits are the rows to sample from.
        rows = logits if len(last) == len(positions) else torch.stack([parts[c][-1] for c in last]) if last else logits[:0]
        picked = self._sampler.pick(rows, [chunk.sequence for chunk in last])
        asked = [row for row, chunk in enumerate(last) if chunk.sequence.request.num_logprobs is not None]
        scored = [chunk for chunk in chunks if must_score(chunk.sequence)]
        of_prompts = [_score_prompt(chunk, parts[chunk]) for chunk in scored]
        picks, of_outputs, *of_scored = read_back([picked, _score_outputs(rows, picked[0], last, asked), *of_prompts])
        tokens = {c: (int(token), int(is_sound)) for c, token, is_sound in zip(last, *picks, strict=True)}
        faults = {c: self._sampler.fault(c.sequence) or NOTHING_LEFT for c, (_, is_sound) in tokens.items() if is_sound < 0}
        scores = dict(zip((last[row] for row in asked), to_scores(of_outputs), strict=True))
        prompts = dict(zip(scored, of_scored, strict=True))
        outcomes = [_outcome(c, tokens.get(c, (None, 1)), prompts.get(c, ()), scores.get(c)) for c in chunks]
        return [replace(o, fault=faults[o.chunk]) if o.chunk in faults else o for o in outcomes]


def _outcome(chunk: Chunk, picked: tuple[int | None, int], of_prompt: Items[Items[float]], score: Score | None) -> Outcome:
    # Rows of the prompt begin with whether they are sound.
    token, sound = picked
    is_sound = sound > 0 and all(row[0] for row in of_prompt)
    return Outcome(chunk, token, is_sound, to_scores([row[1:] for row in of_prompt]) if is_sound else (), score)


def _wanted(chunk: Chunk) -> range:
    # Rows of the chunk whose logits are needed: those that predict a prompt token to be scored, and the one to sample from.
    last = chunk.stop - chunk.start - 1
    if not must_score(chunk.sequence):
        return range(last, last + 1) if chunk.is_last else range(0)
    num_scored = min(chunk.stop, len(chunk.sequence.request.prompt_ids) - 1) - chunk.start
    return range(last + 1 if chunk.is_last else num_scored)


def _score_prompt(chunk: Chunk, logits: torch.Tensor) -> torch.Tensor:
    # For each prompt token that the chunk's logits predict: whether they are sound, and its `score`.
    request = chunk.sequence.request
    targets = request.prompt_ids[chunk.start + 1 : chunk.stop + 1]
    assert request.num_logprobs is not None
    rows = logits[: len(targets)]
    tokens = to_device(torch.tensor(targets, dtype=torch.int64), logits.device)
    return torch.cat([are_sound(rows)[:, None].double(), score(rows, tokens, request.num_logprobs)], 1)


def _score_outputs(logits: torch.Tensor, tokens: torch.Tensor, chunks: Items[Chunk], asked: Items[int]) -> torch.Tensor:
    # Of the rows that are asked for.
    if not asked:
        return logits[:0]
    most = max(chunks[row].sequence.request.num_logprobs or 0 for row in asked)
    if len(asked) == len(chunks):
        return score(logits, tokens, most)
    rows = to_device(torch.tensor(asked, dtype=torch.int64), logits.device)
    return score(logits[rows], tokens[rows], most)
