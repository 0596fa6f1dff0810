"""The engine loop's step: plan, forward, sample, commit.

Synchronous. One thread owns the engine and everything below it.
"""

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

from tokenizers import Tokenizer

from server.engine.adapters.cache import AdapterCache
from server.engine.model.runner import Runner
from server.engine.prompt_weights import PromptWeigher
from server.engine.request import Chunk, ErrorEvent, ErrorKind, FinishReason, Request, Sequence
from server.engine.sampling.grammars import Grammars
from server.engine.sampling.sampler import Sampler
from server.engine.scheduling.kv_cache import needs_prompt_logprobs
from server.engine.scheduling.scheduler import Scheduler
from server.engine.step import ChunkOutput, Emit, Reply, StepExecutor, Stopwatch

logger = logging.getLogger(__name__)
OVERFLOW = "the model's numbers overflow under these adapters and weights"


class Engine:
    """An engine that runs requests together. Each request's events go to the `emit` that it was submitted with."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        adapter_cache: AdapterCache,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        clock: Callable[[], float] = time.monotonic,
        grammars: Grammars | None = None,
        weigher: PromptWeigher | None = None,
    ) -> None:
        self.scheduler, self.adapter_cache, self.clock = scheduler, adapter_cache, clock
        self.weigher = weigher
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._executor = StepExecutor(runner, Sampler(self._stop_ids, grammars))
        self._replies: dict[Sequence, Reply] = {}
        self._by_id: dict[str, list[Sequence]] = {}

    def submit(self, request: Request, emit: Emit) -> None:
        """Queue a request. Its timeout began `request.elapsed_s` ago."""
        assert request.auto is None, "its weights are computed first"
        deadline = None if request.timeout_s is None else self.clock() + request.timeout_s - request.elapsed_s
        sequences = [Sequence(request, choice, deadline=deadline) for choice in range(request.sampling.num_choices)]
        self._by_id[request.id] = sequences
        self.adapter_cache.add_request(request)
        for sequence in sequences:
            self._replies[sequence] = Reply(sequence, emit, self._tokenizer, self._stop_ids, Stopwatch(self.clock))
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Mark a request as aborted; the next step frees its blocks and adapters. Does nothing if the request has ended."""
        for sequence in self._by_id.get(request_id, ()):
            self.scheduler.abort(sequence)

    @property
    def can_step(self) -> bool:
        """Whether a step would do anything now. If not, a command, a deadline or the arrival of an adapter changes that."""
        return self.scheduler.can_step or (self.weigher is not None and self.weigher.has_work)

    def time_left(self) -> float | None:
        """Return the seconds until the next deadline, at least 0; None if no request has a deadline."""
        deadline = self.scheduler.next_deadline
        return None if deadline is None else max(0.0, deadline - self.clock())

    def wake(self) -> None:
        """Make the next step check the waiting sequences again, because an adapter was loaded."""
        self.scheduler.wake()

    def step(self) -> None:
        """Weigh queued prompts, drop aborted and expired requests, compute one batch, and send its events."""
        if self.weigher and self.weigher.has_work:
            self.weigher.step(is_busy=bool(self.scheduler.running))
        self._drop_ended()
        chunks = self.scheduler.plan()
        self._fail_unservable()
        chunks = [chunk for chunk in chunks if chunk.sequence in self._replies]
        if chunks:
            for chunk in chunks:
                self._replies[chunk.sequence].stopwatch.begin()
            for output in self._compute(chunks):
                self._commit_safely(output)

    def _drop_ended(self) -> None:
        if self.adapter_cache.collect():
            self.scheduler.wake()
        self._fail_unservable()
        for sequence in self.scheduler.drop_aborted():
            self._finish(sequence, "cancelled")
        now = self.clock()
        self.scheduler.raise_overdue(now)
        for sequence in self.scheduler.drop_expired(now):
            if sequence in self._replies:
                self._fail(sequence, f"not done within {sequence.request.timeout_s:g} s", "timeout")

    def _fail_unservable(self) -> None:
        for sequence, reason in self.adapter_cache.take_failed().items():
            if sequence in self._replies:
                self._fail(sequence, reason, "adapter")

    def _compute(self, chunks: Items[Chunk]) -> list[ChunkOutput]:
        # An error in a batch may come from one request's data. Each chunk is tried alone, so that only its request fails.
        try:
            return self._executor.compute(chunks)
        except Exception as error:
            if self._executor.runner.is_broken(error):
                raise
            logger.exception("a step of %d requests failed", len(chunks))
            if len(chunks) == 1:
                self._fail(chunks[0].sequence, f"the step failed: {error!r}", "engine")
                return []
            return [output for chunk in chunks if chunk.sequence in self._replies for output in self._compute([chunk])]

    def _commit_safely(self, output: ChunkOutput) -> None:
        try:
            self._commit(output)
        except Exception as error:  # an error in one reply must not end the other requests
            logger.exception("what a step said to a request failed")
            if output.chunk.sequence in self._replies:
                self._fail(output.chunk.sequence, f"the step failed: {error!r}", "engine")

    def _commit(self, output: ChunkOutput) -> None:
        chunk, token = output.chunk, output.token
        sequence = chunk.sequence
        if sequence not in self._replies:
            return  # another choice of the same request has failed
        if not output.is_valid:
            has_grammar = sequence.request.sampling.grammar is not None
            self._fail(sequence, output.fault or OVERFLOW, "grammar" if output.fault and has_grammar else "engine")
            return
        if needs_prompt_logprobs(sequence):
            logprobs = self._replies[sequence].prompt_logprobs(chunk.start + 1, output.prompt_logprobs)
            for other in self._by_id[sequence.request.id]:
                self._replies[other].add_prompt_logprobs(logprobs)
        self.scheduler.commit(chunk, token)
        reply = self._replies[sequence]
        reply.emit_prompt()
        reason: FinishReason | None = None
        if token is not None:
            reason = reply.add_token(token, output.logprobs)
        elif sequence.request.max_tokens == 0 and chunk.stop == sequence.num_tokens:
            reason = "length"
        if reason:
            self.scheduler.finish(sequence)
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._replies[sequence].finish(reason)
        del self._replies[sequence]
        remaining = self._by_id[sequence.request.id]
        remaining.remove(sequence)
        if not remaining:
            del self._by_id[sequence.request.id]
            self.adapter_cache.finish_request(sequence.request)

    def _fail(self, sequence: Sequence, message: str, kind: ErrorKind) -> None:
        # If one choice fails, the whole request fails.
        choices = self._by_id.pop(sequence.request.id)
        emit = self._replies[sequence].emit
        for other in choices:
            del self._replies[other]
            if other in self.scheduler.running or other in self.scheduler.waiting:
                self.scheduler.finish(other)
        self.adapter_cache.finish_request(sequence.request)
        emit(ErrorEvent(message, kind))
