"""The scheduler: the sequences of a step, and the number of tokens of each. No tensor, no clock.

A sequence joins when the fair queue gives its turn, its adapters are resident, and the KV memory has room for its tokens so far.
Running sequences decode in every step; the rest of the step's tokens goes to prompts, in chunks. A sequence's memory grows block
by block. When no block is left, the sequence that joined last is preempted: it gives up its blocks and is computed again later.
The same happens to a sequence of the tenant that has most, when a tenant waits that has nothing. A sequence that waited too long
behind higher priorities is raised to the highest priority present.
"""

import heapq
from itertools import count
from math import inf
from typing import Literal, Protocol

from server.engine.request import Chunk, Sequence
from server.engine.scheduling.fair_queue import Ageing, FairQueue, owed_to
from server.engine.scheduling.kv_cache import KvCache
from server.engine.scheduling.step_budget import PromptTurns, Room, StepLimits

Residency = Literal["ready", "loading", "full"]


class ResidencyGate(Protocol):
    """Keeps the adapters of running sequences in their slots.

    Every sequence is asked about from the moment its turn comes, and again in every plan but where it `is_behind`, until it hears
    "ready".
    The gate holds something for a sequence whose last answer was "ready" or "loading", and nothing after "full".
    """

    def pin(self, sequence: Sequence) -> Residency:
        """Return whether a sequence's adapters (`request.residents`) are there. Returns at once.

        "ready": they are, and stay until `unpin`; the sequence runs now. "loading": they are being read; the sequence waits
        alone, others pass. "full": there is no room, for what is resident is held for others: nobody may pass, but those that
        heard "loading" before. So it must not be said while nothing is held for anybody.
        """
        ...

    def is_behind(self, sequence: Sequence) -> bool:
        """Whether `pin` would say "loading" now, and hold no more than it does: as many adapters are read as may be, and one of
        its own is not among them. Then it need not be asked."""
        ...

    def unpin(self, sequence: Sequence) -> None:
        """Let go of what is held for a sequence.

        Called once after "ready", when the sequence ends or is preempted (then `pin` asks anew, later), and once after
        "loading", if the sequence is dropped before it hears anything else. Never after "full", and never twice.
        """
        ...


class Choices:
    """The requests of several choices whose prompt is not computed yet."""

    def __init__(self) -> None:
        # By identity: all choices have one request object, and comparing two would compare their prompts. The first leads.
        self._groups: dict[int, list[Sequence]] = {}

    def join(self, sequence: Sequence) -> bool:
        """Take in a new sequence; returns whether it has to wait for another one to compute its prompt."""
        if sequence.request.num_choices == 1:
            return False
        group = self._groups.setdefault(id(sequence.request), [])
        group.append(sequence)
        return len(group) > 1

    def is_following(self, sequence: Sequence) -> bool:
        """Whether another one computes the prompt of this sequence."""
        group = self._groups.get(id(sequence.request))
        return group is not None and sequence in group[1:]

    def disband(self, sequence: Sequence) -> list[Sequence]:
        """Return those that waited for this sequence, which has computed the prompt."""
        return self._groups.pop(id(sequence.request), [])[1:]

    def leave(self, sequence: Sequence) -> Sequence | None:
        """Take out a sequence that ends; if others waited for it, returns the one that computes the prompt instead."""
        group = self._groups.get(id(sequence.request), [])
        if sequence not in group:
            return None
        has_led = group[0] is sequence
        group.remove(sequence)
        if not group:
            del self._groups[id(sequence.request)]
        return group[0] if group and has_led else None


MIN_COMPACT = 64


class Deadlines:
    """The sequences that have a deadline, the earliest first."""

    def __init__(self) -> None:
        self._sequences: set[Sequence] = set()
        # Those that ended early stay in it until they come up, or are the most of it.
        self._heap: list[tuple[float, int, Sequence]] = []
        self._serials = count()

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence, if it has a deadline."""
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
        """When the next time is up, in monotonic seconds."""
        while self._heap and self._heap[0][2] not in self._sequences:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def expired(self, now: float) -> list[Sequence]:
        """Forget and returns the sequences whose time is up."""
        found: list[Sequence] = []
        while (earliest := self.earliest) is not None and earliest <= now:
            sequence = heapq.heappop(self._heap)[2]
            self._sequences.remove(sequence)
            found.append(sequence)
        return found


class Scheduler:
    """Owns the waiting and the running sequences, their blocks, and what is pinned for them."""

    def __init__(self, cache: KvCache, gate: ResidencyGate, limits: StepLimits, max_priority_wait_s: float = inf) -> None:
        """`max_priority_wait_s`: how long a sequence waits for those of a higher priority; infinite: as long as there are any."""
        self.cache, self.limits = cache, limits
        self.waiting: dict[Sequence, None] = {}
        self.running: dict[Sequence, None] = {}
        """In the order in which they joined."""
        self.num_preemptions = 0
        """So far."""
        self._gate = gate
        self._queue, self._choices, self._deadlines, self._turns = FairQueue(), Choices(), Deadlines(), PromptTurns()
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

        False with nothing there, and when the last plan was empty because all wait for adapters: then sleep until a command
        comes, `next_deadline` is past, or whoever loads adapters calls `wake`.
        """
        return self._can_step and self.has_work

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return len(self.waiting)

    @property
    def next_deadline(self) -> float | None:
        """When the next sequence's time is up, in monotonic seconds."""
        return self._deadlines.earliest

    @property
    def tokens_served(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """By tenant and digests of adapters, the tokens that each active flow was served since it became active.

        Prompt tokens count when a sequence joins, output tokens as they come; not those found in the cache or computed again.
        """
        return self._queue.tokens_served()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the choices of a request one after the other, before the next plan."""
        assert self.cache.num_needed(sequence.max_num_tokens) <= self.cache.num_blocks, "admission refuses what can never run"
        self.waiting[sequence] = None
        self._ageing.begin(sequence)
        self._deadlines.add(sequence)
        if not self._choices.join(sequence):
            self._queue.add(sequence)
        self.wake()

    def wake(self) -> None:
        """Says that an adapter was loaded: the next plan asks again for those that wait."""
        self._can_step = True

    def abort(self, sequence: Sequence) -> None:
        """Mark a sequence that waits or runs, so that it is dropped."""
        self._aborted[sequence] = None
        self.wake()

    def drop_aborted(self) -> list[Sequence]:
        """Take out the sequences that were aborted and have not ended since, frees what they own, and return them."""
        dropped = [s for s in self._aborted if s in self.waiting or s in self.running]
        self._aborted.clear()
        for sequence in dropped:
            self.finish(sequence)
        return dropped

    def drop_expired(self, now: float) -> list[Sequence]:
        """Take out the sequences whose deadline has come, frees what they own, and return them."""
        expired = self._deadlines.expired(now)
        for sequence in expired:
            self.finish(sequence)
        return expired

    def raise_overdue(self, now: float) -> None:
        """Give each sequence that has waited longer than its priority may make it the highest priority that is present."""
        overdue = self._ageing.overdue(now)
        if overdue and self._queue.raise_to_top(overdue):
            self.wake()

    def plan(self) -> list[Chunk]:
        """Return the chunks of the next step, those of one token first. All are to be committed, or their sequences finished."""
        num_preemptions = self.num_preemptions
        self._grow()
        # Who has just given up its blocks must not have them back before another has grown.
        if num_preemptions == self.num_preemptions and self.waiting:
            self._admit()
        chunks = self._chunks()
        self._can_step = bool(chunks)
        return chunks

    def commit(self, chunk: Chunk, token: int | None) -> None:
        """Record that a chunk is computed, and the token sampled after it."""
        sequence = chunk.sequence
        assert sequence in self.running
        sequence.num_computed = chunk.stop
        self.cache.publish(sequence, chunk.start, chunk.stop)
        if token is not None:
            sequence.output_ids.append(token)
            self._queue.serve(sequence, 1)
        if sequence.request.num_choices > 1 and chunk.stop >= len(sequence.request.prompt_ids):
            for other in reversed(self._choices.disband(sequence)):
                self.cache.share_keys(sequence, other)
                self._queue.add(other, is_first=True)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and frees what it owns; what was not committed of it is never found."""
        is_queued = not self._choices.is_following(sequence)
        if next_one := self._choices.leave(sequence):
            self._queue.add(next_one, is_first=True)
        if is_queued:
            self._queue.remove(sequence)
        if sequence in self.running:
            self._release(sequence)
        else:
            del self.waiting[sequence]
            if sequence in self._loading:
                del self._loading[sequence]
                self._gate.unpin(sequence)
        self._deadlines.discard(sequence)
        self._ageing.end(sequence)
        self.wake()

    def check_integrity(self) -> None:
        """Assert that every block is free, cached or owned, once, and that whoever waits owns nothing."""
        self.cache.check_integrity(self.running)
        assert len(self.running) <= self.limits.max_sequences
        assert not self.running.keys() & self.waiting.keys()
        assert not any(s.blocks or s.num_computed for s in self.waiting)
        assert self._loading.keys() <= self.waiting.keys()
        queued = {s for s in self.waiting if not self._choices.is_following(s)}
        self._queue.check_integrity(queued, set(self.running))

    def _grow(self) -> None:
        lacking = [s for s in self.running if self.cache.lacks_block(s)]
        for sequence in sorted(lacking, key=lambda s: s.priority) if lacking else ():
            while sequence in self.running and not self.cache.grow(sequence):
                # Of the lowest priority the last: never one that is ahead of who grows, so two cannot displace each other.
                self._preempt(max(reversed(self.running), key=lambda s: s.priority))

    def _preempt(self, sequence: Sequence) -> None:
        assert len(self.running) > 1, "what runs alone fits in"
        self._release(sequence)
        self.waiting[sequence] = None
        self._queue.put_back(sequence)
        self._ageing.begin(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self.cache.close(sequence)
        self._gate.unpin(sequence)

    def _admit(self) -> None:
        # Those whose adapters were loading have had their turn, and hold what the first of the others may lack.
        is_open = True
        for sequence in [*self._loading]:
            if self._gate.is_behind(sequence):
                self._queue.pass_over(sequence)
            else:
                is_open &= self._let_in(sequence)
        while (first := self._queue.first()) and (is_open or owed_to(first, self.running)):
            if not self._let_in(first):
                break
        self._queue.bring_back()

    def _let_in(self, sequence: Sequence) -> bool:
        # Returns whether others may join after it.
        if self._offer(sequence):
            return True
        others = owed_to(sequence, self.running)
        num_to_close = self.cache.num_to_close(sequence, others, headroom=len(self.running)) if others else None
        if num_to_close is None or (answer := self._ask(sequence)) == "full":
            return False
        if answer == "loading":
            return True  # nobody gives up a place that would stay empty
        for other in others[:num_to_close]:
            self._preempt(other)
        return self._offer(sequence)

    def _ask(self, sequence: Sequence) -> Residency:
        # Pins nothing.
        answer = self._gate.pin(sequence)
        self._loading.pop(sequence, None)
        if answer == "ready":
            self._gate.unpin(sequence)
        elif answer == "loading":
            self._wait_for_load(sequence)
        return answer

    def _wait_for_load(self, sequence: Sequence) -> None:
        self._loading[sequence] = None
        self._queue.pass_over(sequence)

    def _offer(self, sequence: Sequence) -> bool:
        # Lets a sequence join if it can; returns whether others may after it.
        if len(self.running) == self.limits.max_sequences:
            return False
        found = self.cache.find(sequence)
        # A block more for each that runs: who joins should not have to go at once because they grow.
        if not self.cache.has_room(sequence, found, headroom=len(self.running)):
            return False
        answer = self._gate.pin(sequence)
        self._loading.pop(sequence, None)
        if answer == "ready":
            self._join(sequence, found)
        elif answer == "loading":
            self._wait_for_load(sequence)
        return answer != "full"

    def _join(self, sequence: Sequence, found: list[int]) -> None:
        del self.waiting[sequence]
        self.running[sequence] = None
        self.cache.open(sequence, found)
        self._queue.take(sequence)
        self._ageing.end(sequence)
        if not sequence.num_preemptions:
            # Before they are computed: else all free places would go to the flow that is served least now.
            self._queue.serve(sequence, len(sequence.request.prompt_ids) - sequence.num_computed)

    def _chunks(self) -> list[Chunk]:
        single: list[Chunk] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            stop = sequence.num_tokens
            if stop - sequence.num_computed == 1:
                single.append(Chunk(sequence, stop - 1, stop))
            elif stop > sequence.num_computed:
                prompts.append(sequence)
        longer: list[Chunk] = []
        room = Room(self.limits, [chunk.start for chunk in single])
        ordered = self._turns.next_order(prompts)
        for sequence in ordered:
            start = sequence.num_computed
            # Who is of a lower priority than the first stalls nobody for longer.
            is_of_first = sequence.priority == ordered[0].priority
            if count := room.take(start, sequence.num_tokens, first=sequence.num_found, may_exceed=is_of_first):
                (longer if count > 1 else single).append(Chunk(sequence, start, start + count))
        return single + longer
