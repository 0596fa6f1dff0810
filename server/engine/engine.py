"""One turn of the loop: plan, forward, sample, commit. Synchronous; one thread owns it and everything below it."""

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

from tokenizers import Tokenizer

from server.engine.adapters.cache import AdapterTiers
from server.engine.model.runner import Runner
from server.engine.request import Chunk, ErrorEvent, ErrorKind, FinishReason, Request, Sequence
from server.engine.sampling.grammars import Grammars
from server.engine.sampling.sampler import Sampler
from server.engine.scheduling.kv_cache import must_score
from server.engine.scheduling.scheduler import Scheduler
from server.engine.step import Emit, Outcome, Reply, Stopwatch, Turn

logger = logging.getLogger(__name__)
OVERFLOW = "the model's numbers overflow under these adapters and weights"


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
        grammars: Grammars | None = None,
    ) -> None:
        self.scheduler, self.tiers, self.clock = scheduler, tiers, clock
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._turn = Turn(runner, Sampler(self._stop_ids, grammars))
        self._replies: dict[Sequence, Reply] = {}
        self._by_id: dict[str, list[Sequence]] = {}

    def submit(self, request: Request, emit: Emit) -> None:
        """Queue a request."""
        deadline = None if request.timeout_s is None else self.clock() + request.timeout_s
        sequences = [Sequence(request, choice, deadline=deadline) for choice in range(request.num_choices)]
        self._by_id[request.id] = sequences
        self.tiers.expect(request)
        for sequence in sequences:
            self._replies[sequence] = Reply(sequence, emit, self._tokenizer, self._stop_ids, Stopwatch(self.clock))
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Mark a request: the next step frees all that it owns. One that has ended is none of our business."""
        for sequence in self._by_id.get(request_id, ()):
            self.scheduler.abort(sequence)

    @property
    def can_step(self) -> bool:
        """Whether a step would do anything now; if not, a command, a deadline or the arrival of an adapter will change it."""
        return self.scheduler.can_step

    def time_left(self) -> float | None:
        """Return the seconds until a deadline makes a step do something; None where no request has one."""
        deadline = self.scheduler.next_deadline
        return None if deadline is None else max(0.0, deadline - self.clock())

    def wake(self) -> None:
        """Make the next step look again: an adapter was read."""
        self.scheduler.wake()

    def step(self) -> None:
        """Free what was aborted or is too late, then computes one batch and sends its events."""
        self._drop()
        chunks = self.scheduler.plan()
        self._fail_unservable()
        chunks = [chunk for chunk in chunks if chunk.sequence in self._replies]
        if chunks:
            for chunk in chunks:
                self._replies[chunk.sequence].stopwatch.begin()
            for outcome in self._compute(chunks):
                self._commit_alone(outcome)

    def _drop(self) -> None:
        if self.tiers.collect():
            self.scheduler.wake()
        self._fail_unservable()
        for sequence in self.scheduler.drop_aborted():
            self._end(sequence, "cancelled")
        now = self.clock()
        self.scheduler.raise_overdue(now)
        for sequence in self.scheduler.drop_expired(now):
            if sequence in self._replies:
                self._fail(sequence, f"not done within {sequence.request.timeout_s:g} s", "timeout")

    def _fail_unservable(self) -> None:
        for sequence, reason in self.tiers.take_failed().items():
            if sequence in self._replies:
                self._fail(sequence, reason, "adapter")

    def _compute(self, chunks: Items[Chunk]) -> list[Outcome]:
        # What one request's data breaks fails that request: each is tried alone.
        try:
            return self._turn.compute(chunks)
        except Exception as error:
            if self._turn.runner.is_broken(error):
                raise
            logger.exception("a step of %d requests failed", len(chunks))
            if len(chunks) == 1:
                self._fail(chunks[0].sequence, f"the step failed: {error!r}", "engine")
                return []
            return [outcome for chunk in chunks if chunk.sequence in self._replies for outcome in self._compute([chunk])]

    def _commit_alone(self, outcome: Outcome) -> None:
        try:
            self._commit(outcome)
        except Exception as error:  # the words of one request are no reason to end the others
            logger.exception("what a step said to a request failed")
            if outcome.chunk.sequence in self._replies:
                self._fail(outcome.chunk.sequence, f"the step failed: {error!r}", "engine")

    def _commit(self, outcome: Outcome) -> None:
        chunk, token = outcome.chunk, outcome.token
        sequence = chunk.sequence
        if sequence not in self._replies:
            return  # another choice of its request has failed
        if not outcome.is_sound:
            self._fail(sequence, outcome.fault or OVERFLOW, "grammar" if outcome.fault and sequence.request.grammar else "engine")
            return
        if must_score(sequence):
            logprobs = self._replies[sequence].prompt_logprobs(chunk.start + 1, outcome.prompt_scores)
            for other in self._by_id[sequence.request.id]:
                self._replies[other].note_prompt(logprobs)
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
        self._replies[sequence].end(reason)
        del self._replies[sequence]
        left = self._by_id[sequence.request.id]
        left.remove(sequence)
        if not left:
            del self._by_id[sequence.request.id]
            self.tiers.release(sequence.request)

    def _fail(self, sequence: Sequence, message: str, kind: ErrorKind) -> None:
        # With one choice the whole request fails.
        choices = self._by_id.pop(sequence.request.id)
        emit = self._replies[sequence].emit
        for other in choices:
            del self._replies[other]
            if other in self.scheduler.running or other in self.scheduler.waiting:
                self.scheduler.finish(other)
        self.tiers.release(sequence.request)
        emit(ErrorEvent(message, kind))
