"""The scheduler: chooses the sequences of a step, and the number of tokens of each. No tensor, no clock.

A sequence starts when it is first in the fair queue, its adapters are resident, and the KV cache has room for its tokens so far.
Running sequences decode in every step; the rest of the step's tokens goes to prefill, in chunks. A sequence's blocks grow one by
one. If no block is left, the newest running sequence is preempted: it loses its blocks and is computed again later. A sequence of
the tenant with the most running sequences is also preempted if a tenant with nothing running waits. A sequence that waited too
long behind higher priorities is raised to the highest priority present.
"""

import heapq
from itertools import count
from math import inf
from typing import Literal, Protocol

from server.engine.request import Chunk, Sequence
from server.engine.scheduling.fair_queue import Ageing, FairQueue, preemption_candidates
from server.engine.scheduling.kv_cache import KvCache
from server.engine.scheduling.step_budget import PrefillOrder, StepBudget, StepLimits

Residency = Literal["ready", "loading", "full"]


class ResidencyGate(Protocol):
    """Keeps the adapters of running sequences in their slots.

    The scheduler calls `acquire` for a sequence when it first comes up in the queue, and again in every plan until the result is
    "ready", except while `is_load_deferred`. The gate holds something for a sequence whose last result was "ready" or "loading",
    and nothing after "full".
    """

    def acquire(self, sequence: Sequence) -> Residency:
        """Acquire a sequence's adapters (`sequence.residents`) and return whether they are resident. Returns at once.

        "ready": the adapters are resident and stay until `release`; the sequence runs now. "loading": the adapters are being
        read; only this sequence waits, others may pass it. "full": there is no room, because the resident adapters are in use by
        others; no sequence may pass, except those whose last result was "loading". So "full" must not be returned while nothing
        is held for any sequence.
        """
        ...

    def is_load_deferred(self, sequence: Sequence) -> bool:
        """Whether `acquire` would return "loading" now and hold nothing more than before.

        True if the maximum number of loads is in progress and one of the sequence's adapters is not among them. Then `acquire`
        need not be called.
        """
        ...

    def release(self, sequence: Sequence) -> None:
        """Release what is held for a sequence.

        Called once after "ready", when the sequence ends or is preempted (`acquire` is called again later), and once after
        "loading", if the sequence is dropped before another result. Never called after "full", and never twice.
        """
        ...


class ChoiceGroups:
    """Groups of the choices of one request whose prompt is not computed yet. The first choice of a group computes it."""

    def __init__(self) -> None:
        # Keyed by identity: all choices share one request object, and comparing requests would compare their prompts.
        self._groups: dict[int, list[Sequence]] = {}

    def add(self, sequence: Sequence) -> bool:
        """Add a new sequence. Return whether it must wait for another choice to compute its prompt."""
        if sequence.request.sampling.num_choices == 1:
            return False
        group = self._groups.setdefault(id(sequence.request), [])
        group.append(sequence)
        return len(group) > 1

    def is_follower(self, sequence: Sequence) -> bool:
        """Whether another choice computes the prompt of this sequence."""
        group = self._groups.get(id(sequence.request))
        return group is not None and sequence in group[1:]

    def pop_followers(self, sequence: Sequence) -> list[Sequence]:
        """Remove the group of a sequence that has computed the prompt, and return the choices that waited for it."""
        return self._groups.pop(id(sequence.request), [])[1:]

    def remove(self, sequence: Sequence) -> Sequence | None:
        """Remove a sequence that ends. Return the choice that must compute the prompt instead, or None."""
        group = self._groups.get(id(sequence.request), [])
        if sequence not in group:
            return None
        was_leader = group[0] is sequence
        group.remove(sequence)
        if not group:
            del self._groups[id(sequence.request)]
        return group[0] if group and was_leader else None


MIN_COMPACT = 64


class Deadlines:
    """The sequences that have a deadline, the earliest first."""

    def __init__(self) -> None:
        self._sequences: set[Sequence] = set()
        # Sequences that ended early stay in the heap until they come up, or until they are most of it.
        self._heap: list[tuple[float, int, Sequence]] = []
        self._serials = count()

    def add(self, sequence: Sequence) -> None:
        """Add a sequence, if it has a deadline."""
        if sequence.deadline is None:
            return
        if len(self._heap) > 2 * len(self._sequences) + MIN_COMPACT:
            self._heap = [entry for entry in self._heap if entry[2] in self._sequences]
            heapq.heapify(self._heap)
        self._sequences.add(sequence)
        heapq.heappush(self._heap, (sequence.deadline, next(self._serials), sequence))

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._sequences.discard(sequence)

    @property
    def earliest(self) -> float | None:
        """The earliest deadline, in monotonic seconds; None if there is none."""
        while self._heap and self._heap[0][2] not in self._sequences:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_expired(self, now: float) -> list[Sequence]:
        """Remove and return the sequences whose deadline has passed."""
        expired: list[Sequence] = []
        while (earliest := self.earliest) is not None and earliest <= now:
            sequence = heapq.heappop(self._heap)[2]
            self._sequences.remove(sequence)
            expired.append(sequence)
        return expired


class Scheduler:
    """The waiting and the running sequences. Owns their blocks and the adapters acquired for them."""

    def __init__(self, kv_cache: KvCache, gate: ResidencyGate, limits: StepLimits, max_priority_wait_s: float = inf) -> None:
        """`max_priority_wait_s` is the longest wait of a sequence behind higher priorities; infinity is no limit."""
        self.kv_cache, self.limits = kv_cache, limits
        self.waiting: dict[Sequence, None] = {}
        self.running: dict[Sequence, None] = {}
        """In the order in which they started."""
        self.num_preemptions = 0
        """Number of preemptions so far."""
        self._gate = gate
        self._queue, self._choices = FairQueue(), ChoiceGroups()
        self._deadlines, self._prefill_order = Deadlines(), PrefillOrder()
        self._ageing = Ageing(max_priority_wait_s)
        self._loading: dict[Sequence, None] = {}
        self._aborted: dict[Sequence, None] = {}
        self._can_step = True

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def can_step(self) -> bool:
        """Whether `plan` may have something to do now.

        False if there are no sequences, or if the last plan was empty because all sequences wait for adapters. Then the engine
        may sleep until a command comes, `next_deadline` passes, or an adapter's load calls `wake`.
        """
        return self._can_step and self.has_work

    @property
    def num_waiting(self) -> int:
        """Number of waiting sequences."""
        return len(self.waiting)

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of any sequence, in monotonic seconds."""
        return self._deadlines.earliest

    @property
    def tokens_charged(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """Tokens charged to each active flow since it became active, by tenant and adapter digests.

        Prompt tokens are charged when a sequence starts, output tokens when they are sampled. Tokens found in the prefix cache or
        computed again are not charged.
        """
        return self._queue.tokens_charged()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Add all choices of a request one after the other, before the next plan."""
        assert self.kv_cache.num_needed(sequence.max_num_tokens) <= self.kv_cache.num_blocks, (
            "admission refuses what can never run"
        )
        self.waiting[sequence] = None
        self._ageing.begin(sequence)
        self._deadlines.add(sequence)
        if not self._choices.add(sequence):
            self._queue.add(sequence)
        self.wake()

    def wake(self) -> None:
        """Note that an adapter finished loading, so the next `plan` retries the waiting sequences."""
        self._can_step = True

    def abort(self, sequence: Sequence) -> None:
        """Mark a waiting or running sequence to be dropped."""
        self._aborted[sequence] = None
        self.wake()

    def drop_aborted(self) -> list[Sequence]:
        """Remove the aborted sequences that have not ended since, free what they own, and return them."""
        dropped = [s for s in self._aborted if s in self.waiting or s in self.running]
        self._aborted.clear()
        for sequence in dropped:
            self.finish(sequence)
        return dropped

    def drop_expired(self, now: float) -> list[Sequence]:
        """Remove the sequences whose deadline has passed, free what they own, and return them."""
        expired = self._deadlines.pop_expired(now)
        for sequence in expired:
            self.finish(sequence)
        return expired

    def raise_overdue(self, now: float) -> None:
        """Raise each sequence that waited too long behind higher priorities to the highest priority present."""
        overdue = self._ageing.overdue(now)
        if overdue and self._queue.raise_to_top(overdue):
            self.wake()

    def plan(self) -> list[Chunk]:
        """Return the chunks of the next step, chunks of one token first. Each must be committed, or its sequence finished."""
        num_preemptions = self.num_preemptions
        self._grow()
        # A sequence preempted in this step must not be readmitted before the others have grown.
        if num_preemptions == self.num_preemptions and self.waiting:
            self._admit()
        chunks = self._plan_chunks()
        self._can_step = bool(chunks)
        return chunks

    def commit(self, chunk: Chunk, token: int | None) -> None:
        """Record that a chunk is computed, and the token sampled after it."""
        sequence = chunk.sequence
        assert sequence in self.running
        sequence.num_computed = chunk.stop
        self.kv_cache.publish(sequence, chunk.start, chunk.stop)
        if token is not None:
            sequence.output_ids.append(token)
            self._queue.charge(sequence, 1)
        if sequence.request.sampling.num_choices > 1 and chunk.stop >= len(sequence.request.prompt_ids):
            for other in reversed(self._choices.pop_followers(sequence)):
                self.kv_cache.copy_block_keys(sequence, other)
                self._queue.add(other, is_first=True)

    def finish(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence and free what it owns. Its uncommitted tokens never enter the prefix cache."""
        is_queued = not self._choices.is_follower(sequence)
        if leader := self._choices.remove(sequence):
            self._queue.add(leader, is_first=True)
        if is_queued:
            self._queue.remove(sequence)
        if sequence in self.running:
            self._release(sequence)
        else:
            del self.waiting[sequence]
            if sequence in self._loading:
                del self._loading[sequence]
                self._gate.release(sequence)
        self._deadlines.discard(sequence)
        self._ageing.end(sequence)
        self.wake()

    def check_integrity(self) -> None:
        """Assert that every block is either free, cached or owned, and that waiting sequences own nothing."""
        self.kv_cache.check_integrity(self.running)
        assert len(self.running) <= self.limits.max_sequences
        assert not self.running.keys() & self.waiting.keys()
        assert not any(s.blocks or s.num_computed for s in self.waiting)
        assert self._loading.keys() <= self.waiting.keys()
        queued = {s for s in self.waiting if not self._choices.is_follower(s)}
        self._queue.check_integrity(queued, set(self.running))

    def _grow(self) -> None:
        growing = [s for s in self.running if self.kv_cache.needs_block(s)]
        for sequence in sorted(growing, key=lambda s: s.priority) if growing else ():
            while sequence in self.running and not self.kv_cache.grow(sequence):
                # Preempt the newest sequence of the lowest priority. It is never ahead of the sequence that grows, so two
                # sequences cannot preempt each other again and again.
                self._preempt(max(reversed(self.running), key=lambda s: s.priority))

    def _preempt(self, sequence: Sequence) -> None:
        assert len(self.running) > 1, "what runs alone fits in"
        self._release(sequence)
        self.waiting[sequence] = None
        self._queue.requeue(sequence)
        self._ageing.begin(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self.kv_cache.free(sequence)
        self._gate.release(sequence)

    def _admit(self) -> None:
        # Sequences whose adapters were loading come first: they were first in the queue before, and they may hold what the next
        # one lacks.
        can_admit = True
        for sequence in [*self._loading]:
            if self._gate.is_load_deferred(sequence):
                self._queue.skip(sequence)
            else:
                can_admit &= self._try_admit(sequence)
        while (first := self._queue.first()) and (can_admit or preemption_candidates(first, self.running)):
            if not self._try_admit(first):
                break
        self._queue.unskip_all()

    def _try_admit(self, sequence: Sequence) -> bool:
        # Returns whether more sequences may be admitted after this one.
        if self._try_start(sequence):
            return True
        candidates = preemption_candidates(sequence, self.running)
        num_to_preempt = self.kv_cache.num_to_preempt(sequence, candidates, headroom=len(self.running)) if candidates else None
        if num_to_preempt is None or (residency := self._check_residency(sequence)) == "full":
            return False
        if residency == "loading":
            return True  # preempt nothing for a place that would stay empty
        for other in candidates[:num_to_preempt]:
            self._preempt(other)
        return self._try_start(sequence)

    def _check_residency(self, sequence: Sequence) -> Residency:
        # Checks the adapters without keeping them acquired.
        residency = self._gate.acquire(sequence)
        self._loading.pop(sequence, None)
        if residency == "ready":
            self._gate.release(sequence)
        elif residency == "loading":
            self._wait_for_load(sequence)
        return residency

    def _wait_for_load(self, sequence: Sequence) -> None:
        self._loading[sequence] = None
        self._queue.skip(sequence)

    def _try_start(self, sequence: Sequence) -> bool:
        # Starts a sequence if it can. Returns whether more sequences may be admitted after it.
        if len(self.running) == self.limits.max_sequences:
            return False
        prefix_blocks = self.kv_cache.find_prefix(sequence)
        # One block of headroom for each running sequence: a new one should not be preempted at once because the others grow.
        if not self.kv_cache.has_room(sequence, prefix_blocks, headroom=len(self.running)):
            return False
        residency = self._gate.acquire(sequence)
        self._loading.pop(sequence, None)
        if residency == "ready":
            self._start(sequence, prefix_blocks)
        elif residency == "loading":
            self._wait_for_load(sequence)
        return residency != "full"

    def _start(self, sequence: Sequence, prefix_blocks: list[int]) -> None:
        del self.waiting[sequence]
        self.running[sequence] = None
        self.kv_cache.allocate(sequence, prefix_blocks)
        self._queue.start(sequence)
        self._ageing.end(sequence)
        if not sequence.num_preemptions:
            # Charged before they are computed: otherwise the flow with the lowest counter would get all free places at once.
            self._queue.charge(sequence, len(sequence.request.prompt_ids) - sequence.num_computed)

    def _plan_chunks(self) -> list[Chunk]:
        single: list[Chunk] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            stop = sequence.num_tokens
            if stop - sequence.num_computed == 1:
                single.append(Chunk(sequence, stop - 1, stop))
            elif stop > sequence.num_computed:
                prompts.append(sequence)
        multi_token: list[Chunk] = []
        ordered = self._prefill_order.next_order(prompts)
        # A prompt of lower priority than the first one must not stall the others for longer.
        top = [sequence for sequence in ordered if sequence.priority == ordered[0].priority]
        num_short = sum(self.limits.is_short(sequence.num_prefix_tokens, sequence.num_tokens) for sequence in top)
        budget = StepBudget(self.limits, [chunk.start for chunk in single], num_short)
        for sequence in ordered:
            start = sequence.num_computed
            is_top = sequence.priority == ordered[0].priority
            if count := budget.take(start, sequence.num_tokens, prefill_start=sequence.num_prefix_tokens, may_exceed=is_top):
                (multi_token if count > 1 else single).append(Chunk(sequence, start, start + count))
        return single + multi_token
