"""One turn of the loop: plan, forward, sample, commit. Synchronous; one thread owns it and everything below it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from transformers import PreTrainedTokenizerBase

from server.engine.request import DoneEvent, ErrorEvent, Event, FinishReason, Request, Sequence, TextEvent, TokenLogprob
from server.engine.runner import Runner
from server.engine.sampler import log_probabilities, sample
from server.engine.scheduler import Chunk, Scheduler
from server.engine.text import TextStream

Emit = Callable[[Event], None]


@dataclass(slots=True)
class _Live:
    # What the engine keeps of a request beside its sequence.
    emit: Emit
    text: TextStream
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Engine:
    """Runs requests together; each hears its own events through the `emit` it came with."""

    def __init__(self, scheduler: Scheduler, runner: Runner, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> None:
        self.scheduler, self._runner, self._tokenizer = scheduler, runner, tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._live: dict[Sequence, _Live] = {}
        self._by_id: dict[str, Sequence] = {}

    def submit(self, request: Request, emit: Emit) -> None:
        """Queues a request."""
        sequence = Sequence(request)
        text = TextStream(self._tokenizer.backend_tokenizer, request.prompt_ids, request.stop)
        self._live[sequence] = _Live(emit, text)
        self._by_id[request.id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Marks a request: the next step frees all that it owns. One that has ended is none of our business."""
        if sequence := self._by_id.get(request_id):
            sequence.is_aborted = True

    def step(self) -> None:
        """Frees what was aborted, then computes one batch and sends its events."""
        for sequence in self.scheduler.drop_aborted():
            self._done(sequence, "cancelled")
        chunks = self.scheduler.plan()
        if not chunks:
            return
        spans = [self._wanted(chunk) for chunk in chunks]
        starts = accumulate((chunk.stop - chunk.start for chunk in chunks), initial=0)
        positions = [start + row for start, span in zip(starts, spans, strict=False) for row in span]
        parts = self._runner.forward(chunks, positions).split([len(span) for span in spans])
        sound = [(chunk, logits) for chunk, logits in zip(chunks, parts, strict=True) if self._is_sound(chunk, logits)]
        for chunk, logits in sound:
            if self._scores_prompt(chunk.sequence):
                self._score(chunk, logits)
        tokens = self._sample({chunk.sequence: logits[-1] for chunk, logits in sound if chunk.is_last})
        for chunk, _ in sound:
            self._commit(chunk, tokens.get(chunk.sequence))

    def _is_sound(self, chunk: Chunk, logits: torch.Tensor) -> bool:
        # A sequence whose numbers overflow fails by itself.
        if not len(logits) or bool(logits.amax(-1).isfinite().all()):
            return True
        self.scheduler.finish(chunk.sequence)
        live = self._live.pop(chunk.sequence)
        del self._by_id[chunk.sequence.request.id]
        live.emit(ErrorEvent("the model's numbers overflow under these adapters and weights"))
        return False

    def _scores_prompt(self, sequence: Sequence) -> bool:
        return sequence.request.echo and sequence.request.num_logprobs is not None and not sequence.output_ids

    def _wanted(self, chunk: Chunk) -> range:
        # Rows of the chunk whose logits are needed: those that predict a prompt token to be scored, and the one to sample from.
        last = chunk.stop - chunk.start - 1
        if not self._scores_prompt(chunk.sequence):
            return range(last, last + 1) if chunk.is_last else range(0)
        num_scored = min(chunk.stop, len(chunk.sequence.request.prompt_ids) - 1) - chunk.start
        return range(last + 1 if chunk.is_last else num_scored)

    def _sample(self, rows: dict[Sequence, torch.Tensor]) -> dict[Sequence, int]:
        if not rows:
            return {}
        logits = torch.stack(list(rows.values()))
        tokens = dict(zip(rows, sample(logits, list(rows)), strict=True))
        self._note_outputs(logits, tokens)
        return tokens

    def _score(self, chunk: Chunk, logits: torch.Tensor) -> None:
        request, live = chunk.sequence.request, self._live[chunk.sequence]
        if chunk.start == 0:
            live.logprobs.append(self._logprob(request.prompt_ids[0], 0, None, {}))
        targets = request.prompt_ids[chunk.start + 1 : chunk.stop + 1]
        if not targets:
            return
        assert request.num_logprobs is not None
        scores = log_probabilities(logits[: len(targets)], targets, request.num_logprobs)
        for place, (token, (value, top)) in enumerate(zip(targets, scores, strict=True), chunk.start + 1):
            live.logprobs.append(self._logprob(token, request.prompt_offsets[place], value, top))

    def _note_outputs(self, logits: torch.Tensor, tokens: dict[Sequence, int]) -> None:
        rows = {s: i for i, s in enumerate(tokens) if s.request.num_logprobs is not None}
        if not rows:
            return
        most = max(s.request.num_logprobs or 0 for s in rows)
        scores = log_probabilities(logits[list(rows.values())], [tokens[s] for s in rows], most)
        for sequence, (value, top) in zip(rows, scores, strict=True):
            request, live = sequence.request, self._live[sequence]
            offset = (len(request.prompt_text) if request.echo else 0) + live.text.num_characters
            few = dict(list(top.items())[: request.num_logprobs])
            live.logprobs.append(self._logprob(tokens[sequence], offset, value, few))

    def _logprob(self, token: int, offset: int, value: float | None, top: dict[int, float]) -> TokenLogprob:
        decode = self._tokenizer.backend_tokenizer.decode
        alike: dict[str, float] = {}
        for other, score in top.items():  # the likeliest first: of tokens that look the same it stays
            alike.setdefault(decode([other], skip_special_tokens=False), score)
        return TokenLogprob(
            decode([token], skip_special_tokens=False),
            offset,
            value,
            alike,
        )

    def _commit(self, chunk: Chunk, token: int | None) -> None:
        sequence = chunk.sequence
        request, live = sequence.request, self._live[sequence]
        self.scheduler.commit(chunk, token)
        text = request.prompt_text if request.echo and chunk.start == 0 else ""
        reason: FinishReason | None = None
        if token is not None:
            if token in self._stop_ids:
                reason = "stop"
            else:
                text += live.text.push(token)
                if live.text.is_stopped:
                    reason = "stop_sequence"
                elif len(sequence.output_ids) == request.max_tokens:
                    reason = "length"
        elif request.max_tokens == 0 and chunk.stop == sequence.num_tokens:
            reason = "length"
        if reason:
            text += live.text.flush()
        if text or live.logprobs:
            live.emit(TextEvent(text, tuple(live.logprobs), is_prompt=not sequence.output_ids))
            live.logprobs.clear()
        if reason:
            self.scheduler.finish(sequence)
            self._done(sequence, reason)

    def _done(self, sequence: Sequence, reason: FinishReason) -> None:
        live = self._live.pop(sequence)
        del self._by_id[sequence.request.id]
        live.emit(DoneEvent(reason, len(sequence.request.prompt_ids), len(sequence.output_ids)))
