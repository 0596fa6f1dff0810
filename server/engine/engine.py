"""One turn of the loop: plan, forward, sample, commit. Synchronous; one thread owns it and everything below it."""

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate

import torch
from tokenizers import Tokenizer

from server.engine.adapters.tiers import AdapterTiers
from server.engine.model.runner import Runner
from server.engine.replies import Emit, Reply, Score
from server.engine.request import ErrorEvent, ErrorKind, FinishReason, Request, Sequence
from server.engine.sampling.sampler import Sampler, log_probabilities, sound_rows
from server.engine.scheduling.kv_cache import must_score
from server.engine.scheduling.scheduler import Chunk, Scheduler

logger = logging.getLogger(__name__)
OVERFLOW = "the model's numbers overflow under these adapters and weights"


@dataclass(frozen=True, slots=True)
class _Outcome:
    # What a step made of a chunk: the next token where it is the last, and the scores that were asked for.
    chunk: Chunk
    token: int | None
    is_sound: bool
    prompt_scores: Items[Score]
    score: Score | None


class Engine:
    """Runs requests together; each hears its own events through the `emit` it came with."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tiers: AdapterTiers,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler, self.tiers, self.clock = scheduler, tiers, clock
        self._runner, self._tokenizer = runner, tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._sampler = Sampler(self._stop_ids)
        self._replies: dict[Sequence, Reply] = {}
        self._by_id: dict[str, list[Sequence]] = {}

    def submit(self, request: Request, emit: Emit) -> None:
        """Queues a request."""
        deadline = None if request.timeout_s is None else self.clock() + request.timeout_s
        sequences = [Sequence(request, choice, deadline=deadline) for choice in range(request.num_choices)]
        self._by_id[request.id] = sequences
        for sequence in sequences:
            self._replies[sequence] = Reply(sequence, emit, self._tokenizer, self._stop_ids)
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Marks a request: the next step frees all that it owns. One that has ended is none of our business."""
        for sequence in self._by_id.get(request_id, ()):
            sequence.is_aborted = True
        self.scheduler.wake()

    @property
    def can_step(self) -> bool:
        """Whether a step would do anything now; if not, a command, a deadline or the arrival of an adapter will change it."""
        return self.scheduler.can_step

    def time_left(self) -> float | None:
        """Returns the seconds until a deadline makes a step do something; None where no request has one."""
        deadline = self.scheduler.next_deadline
        return None if deadline is None else max(0.0, deadline - self.clock())

    def wake(self) -> None:
        """Makes the next step look again: an adapter was read."""
        self.scheduler.wake()

    def step(self) -> None:
        """Frees what was aborted or is too late, then computes one batch and sends its events."""
        self._drop()
        chunks = self.scheduler.plan()
        self._fail_unservable()
        chunks = [chunk for chunk in chunks if chunk.sequence in self._replies]
        if chunks:
            for outcome in self._compute(chunks):
                self._commit(outcome)

    def _drop(self) -> None:
        if self.tiers.collect():
            self.scheduler.wake()
        self._fail_unservable()
        for sequence in self.scheduler.drop_aborted():
            self._end(sequence, "cancelled")
        for sequence in self.scheduler.drop_expired(self.clock()):
            if sequence in self._replies:
                self._fail(sequence, f"not done within {sequence.request.timeout_s:g} s", "timeout", is_dropped=True)

    def _fail_unservable(self) -> None:
        for sequence, reason in self.tiers.take_failed().items():
            if sequence in self._replies:
                self._fail(sequence, reason, "adapter")

    def _compute(self, chunks: Items[Chunk]) -> list[_Outcome]:
        # What one request's data breaks fails that request: each is tried alone.
        try:
            return self._forward(chunks)
        except Exception as error:
            if self._runner.is_broken(error):
                raise
            logger.exception("a step of %d requests failed", len(chunks))
            if len(chunks) == 1:
                self._fail(chunks[0].sequence, f"the step failed: {error!r}", "engine")
                return []
            return [outcome for chunk in chunks if chunk.sequence in self._replies for outcome in self._compute([chunk])]

    def _forward(self, chunks: Items[Chunk]) -> list[_Outcome]:
        spans = [self._wanted(chunk) for chunk in chunks]
        starts = accumulate((chunk.stop - chunk.start for chunk in chunks), initial=0)
        positions = [start + row for start, span in zip(starts, spans, strict=False) for row in span]
        logits = self._runner.forward(chunks, positions)
        parts = dict(zip(chunks, logits.split([len(span) for span in spans]), strict=True))
        scored = {chunk: self._score_prompt(chunk, part) for chunk, part in parts.items() if must_score(chunk.sequence)}
        last = [chunk for chunk in chunks if chunk.is_last]
        # Most steps want one row of each chunk: then the logits are the rows to sample from.
        rows = logits if len(last) == len(positions) else torch.stack([parts[c][-1] for c in last]) if last else logits[:0]
        sampled = self._sampler.sample(rows, [chunk.sequence for chunk in last])
        scores = self._score_outputs(rows, last, sampled.tokens)
        of = {c: (t, s) for c, t, s in zip(last, sampled.tokens, sampled.is_sound, strict=True)}
        outcomes = []
        for chunk in chunks:
            token, is_sound = of.get(chunk, (None, True))
            prompt_scores = scored.get(chunk, ())
            outcomes.append(
                _Outcome(chunk, token, is_sound and prompt_scores is not None, prompt_scores or (), scores.get(chunk))
            )
        return outcomes

    def _wanted(self, chunk: Chunk) -> range:
        # Rows of the chunk whose logits are needed: those that predict a prompt token to be scored, and the one to sample from.
        last = chunk.stop - chunk.start - 1
        if not must_score(chunk.sequence):
            return range(last, last + 1) if chunk.is_last else range(0)
        num_scored = min(chunk.stop, len(chunk.sequence.request.prompt_ids) - 1) - chunk.start
        return range(last + 1 if chunk.is_last else num_scored)

    def _score_prompt(self, chunk: Chunk, logits: torch.Tensor) -> Items[Score] | None:
        # None where the logits are not sound.
        request = chunk.sequence.request
        targets = request.prompt_ids[chunk.start + 1 : chunk.stop + 1]
        assert request.num_logprobs is not None
        if not all(sound_rows(logits[: len(targets)])):
            return None
        return log_probabilities(logits[: len(targets)], targets, request.num_logprobs) if targets else ()

    def _score_outputs(self, logits: torch.Tensor, chunks: Items[Chunk], tokens: Items[int]) -> dict[Chunk, Score]:
        asked = [i for i, chunk in enumerate(chunks) if chunk.sequence.request.num_logprobs is not None]
        if not asked:
            return {}
        most = max(chunks[i].sequence.request.num_logprobs or 0 for i in asked)
        scores = log_probabilities(logits[asked], [tokens[i] for i in asked], most)
        return {chunks[i]: score for i, score in zip(asked, scores, strict=True)}

    def _commit(self, outcome: _Outcome) -> None:
        chunk, token = outcome.chunk, outcome.token
        sequence = chunk.sequence
        if sequence not in self._replies:
            return  # another choice of its request has failed
        if not outcome.is_sound:
            self._fail(sequence, OVERFLOW, "engine")
            return
        if must_score(sequence):
            for other in self._by_id[sequence.request.id]:
                self._replies[other].score_prompt(chunk.start + 1, outcome.prompt_scores)
        self.scheduler.commit(chunk, token)
        reply = self._replies[sequence]
        reply.begin()
        reason: FinishReason | None = None
        if token is not None:
            reason = reply.take(token, outcome.score)
        elif sequence.request.max_tokens == 0 and chunk.stop == sequence.num_tokens:
            reason = "length"
        if reason:
            self.scheduler.finish(sequence)
            self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._replies.pop(sequence).end(reason)
        left = self._by_id[sequence.request.id]
        left.remove(sequence)
        if not left:
            del self._by_id[sequence.request.id]

    def _fail(self, sequence: Sequence, message: str, kind: ErrorKind, is_dropped: bool = False) -> None:
        # With one choice the whole request fails.
        choices = self._by_id.pop(sequence.request.id)
        emit = self._replies[sequence].emit
        for other in choices:
            del self._replies[other]
            if not is_dropped:  # else all of them are, which have one deadline
                self.scheduler.finish(other)
        emit(ErrorEvent(message, kind))
