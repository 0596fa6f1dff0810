"""The fair queue: the order of the waiting sequences, by priority, then by virtual token counters, then by arrival.

Virtual token counters (VTC, Sheng et al. 2024, "Fairness in serving large language models", arXiv 2401.00588, algorithm 2): a
flow that begins to wait is lifted to the lowest counter of the waiting flows, so idleness earns no credit. An idle flow is
forgotten, unless its counter is ahead of the others: otherwise it could reset its counter by being idle.

Within a priority, tenants get equal shares. Within a tenant, adapter flows do: the sequences on the same adapters. Sequences
raised to a priority form flows of their own there, so a backlog of raised sequences gets no more than one flow's share. This
module knows nothing of blocks, slots or steps.
"""

import heapq
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

from server.engine.request import Sequence


def preemption_candidates(waiting: Sequence, running: Collection[Sequence]) -> list[Sequence]:
    """Return the running sequences to preempt, in order, so that `waiting` can run. `running` is in the order of starting.

    Repeatedly takes the newest sequence of the tenant with the most running sequences; a tenant always keeps one. Empty if
    `waiting`'s tenant already runs. Never takes a sequence of higher priority than `waiting`.
    """
    by_tenant = defaultdict(list)
    for other in running:
        by_tenant[other.request.tenant].append(other)
    if waiting.request.tenant in by_tenant:
        return []
    candidates: list[tuple[int, Sequence]] = []
    for sequences in by_tenant.values():
        less_urgent = [other for other in reversed(sequences) if other.priority >= waiting.priority]
        candidates += zip(range(len(sequences), 1, -1), less_urgent, strict=False)
    return [other for _, other in sorted(candidates, key=lambda pair: -pair[0])]


class Ageing:
    """Waiting times of sequences. A sequence that is overdue once stays overdue."""

    def __init__(self, max_wait_s: float) -> None:
        """Set the wait after which a sequence is overdue, in seconds. With infinity, no sequence ever is."""
        self._max_wait_s = max_wait_s
        self._new: dict[Sequence, None] = {}
        self._since: OrderedDict[Sequence, float] = OrderedDict()  # the longest wait first
        self._overdue: dict[Sequence, None] = {}

    def begin(self, sequence: Sequence) -> None:
        """Note that a sequence waits, because it is new or was preempted. Its wait is counted from the next `overdue` call."""
        (self._overdue if sequence.is_overdue else self._new)[sequence] = None

    def end(self, sequence: Sequence) -> None:
        """Note that a sequence runs or has ended."""
        self._new.pop(sequence, None)
        self._since.pop(sequence, None)
        self._overdue.pop(sequence, None)

    def overdue(self, now: float) -> Collection[Sequence]:
        """Return the overdue sequences; `now` is in monotonic seconds. Takes no time for those that are not overdue."""
        for sequence in self._new:
            self._since[sequence] = now
        self._new.clear()
        while self._since:
            sequence, since = next(iter(self._since.items()))
            if now - since < self._max_wait_s:
                break
            del self._since[sequence]
            sequence.is_overdue = True
            self._overdue[sequence] = None
        return self._overdue.keys()


MAX_REMEMBERED = 256
"""Maximum number of idle flows whose counters are remembered. The flow that is idle longest is forgotten first."""
MIN_COMPACT = 16


@dataclass(slots=True, eq=False)
class Flow:
    """One flow of requests with its virtual token counter. It is active while some of its sequences wait or run."""

    num_tokens: int = 0
    """Tokens charged since the flow became active."""
    counter: int = 0
    """Virtual token counter. It never decreases."""
    num_waiting: int = 0
    num_running: int = 0
    is_skipped: bool = False
    """Whether the flow is skipped for now, although it waits."""
    serial: int = 0
    is_in_heap: bool = False

    @property
    def is_active(self) -> bool:
        """Whether some of the flow's sequences wait or run."""
        return self.num_waiting > 0 or self.num_running > 0

    def charge(self, num_tokens: int) -> None:
        """Charge tokens to the flow."""
        self.num_tokens += num_tokens
        self.counter += num_tokens


F = TypeVar("F", bound=Flow)


class VirtualTokenQueue(Generic[F]):
    """Virtual token counter (VTC) queue: the flow that was charged the fewest tokens goes first."""

    def __init__(self) -> None:
        self.active: dict[Hashable, F] = {}
        # One entry for each waiting flow, with a counter that the flow once had. `first` updates stale entries.
        self._heap: list[tuple[int, int, F]] = []
        self._serials = count()
        self._last_emptied: F | None = None
        self._remembered_counters: OrderedDict[Hashable, int] = OrderedDict()

    def get_or_add(self, key: Hashable, make: Callable[[], F]) -> F:
        """Return the flow of this key; make one if it is not active."""
        flow = self.active.get(key)
        if flow is None:
            flow = self.active[key] = make()
            flow.counter = self._remembered_counters.pop(key, 0)
        return flow

    def add_waiting(self, flow: F) -> None:
        """Note that one more sequence of this flow waits."""
        if not flow.num_waiting:
            flow.counter = max(flow.counter, self._min_counter())
            flow.serial = next(self._serials)
            flow.num_waiting = 1
            self._push(flow)
        else:
            flow.num_waiting += 1

    def remove_waiting(self, flow: F) -> None:
        """Note that one sequence fewer of this flow waits."""
        flow.num_waiting -= 1
        if not flow.num_waiting:
            self._last_emptied = flow

    def first(self) -> F | None:
        """Return the waiting flow with the lowest counter that is not skipped. Among equals, the longest wait goes first."""
        while self._heap:
            counter, serial, flow = self._heap[0]
            if not flow.num_waiting or flow.is_skipped:
                heapq.heappop(self._heap)
                flow.is_in_heap = False
            elif (counter, serial) != (flow.counter, flow.serial):
                heapq.heapreplace(self._heap, (flow.counter, flow.serial, flow))
            else:
                return flow
        return None

    def skip(self, flow: F) -> None:
        """Skip a flow in `first` until `unskip`."""
        flow.is_skipped = True

    def unskip(self, flow: F) -> None:
        """End `skip`."""
        flow.is_skipped = False
        if flow.num_waiting:
            self._push(flow)

    def drop_idle(self, key: Hashable) -> None:
        """Forget the flow of this key if it is idle. Its counter is remembered if that is ahead of the waiting flows' minimum."""
        if self.active[key].is_active:
            return
        counter = self.active.pop(key).counter
        min_counter = self._min_counter()
        if counter > min_counter:
            self._remembered_counters[key] = counter
        while self._remembered_counters and (
            len(self._remembered_counters) > MAX_REMEMBERED or next(iter(self._remembered_counters.values())) <= min_counter
        ):
            self._remembered_counters.popitem(last=False)

    def _min_counter(self) -> int:
        flow = self.first() or self._last_emptied
        return flow.counter if flow else 0

    def _push(self, flow: F) -> None:
        if flow.is_in_heap:
            return
        if len(self._heap) > 2 * len(self.active) + MIN_COMPACT:
            self._compact()
        flow.is_in_heap = True
        heapq.heappush(self._heap, (flow.counter, flow.serial, flow))

    def _compact(self) -> None:
        # The heap may still hold flows that stopped waiting before they came up.
        entries = []
        for entry in self._heap:
            flow = entry[2]
            flow.is_in_heap = flow.num_waiting > 0
            if flow.is_in_heap:
                entries.append(entry)
        heapq.heapify(entries)
        self._heap = entries


@dataclass(slots=True, eq=False)
class AdapterFlow(Flow):
    """The sequences of one tenant and priority on the same adapters, in order of arrival."""

    adapters: tuple[str, ...] = ()
    """Digests of the adapters; empty for the base model alone."""
    is_raised: bool = False
    """Whether the sequences were raised from a lower priority, see `FairQueue.raise_to_top`."""
    queue: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)


@dataclass(slots=True, eq=False)
class TenantFlow(Flow):
    """A tenant's flow within a priority, with the tenant's adapter flows."""

    name: str = ""
    flows: VirtualTokenQueue[AdapterFlow] = field(default_factory=VirtualTokenQueue)


@dataclass(frozen=True, slots=True)
class _Placement:
    # The queues and flows that a waiting or running sequence belongs to.
    priority: int
    level: VirtualTokenQueue[TenantFlow]
    tenant: TenantFlow
    flow: AdapterFlow


class FairQueue:
    """The waiting sequences in order, with counters of the tokens charged to each tenant and adapter flow."""

    def __init__(self) -> None:
        self._levels: dict[int, VirtualTokenQueue[TenantFlow]] = {}
        self._placements: dict[Sequence, _Placement] = {}
        self._skipped: list[_Placement] = []

    def add(self, sequence: Sequence, *, is_first: bool = False) -> None:
        """Queue a new sequence at the end of its flow, or at the front with `is_first`."""
        self._placements[sequence] = placement = self._make_placement(sequence)
        self._enqueue(sequence, placement, is_first)

    def first(self) -> Sequence | None:
        """Return the next sequence to run that is not skipped."""
        for priority in sorted(self._levels):
            level = self._levels[priority]
            while tenant := level.first():
                if flow := tenant.flows.first():
                    return next(iter(flow.queue))
                level.skip(tenant)  # until one of its flows is unskipped
        return None

    def raise_to_top(self, sequences: Iterable[Sequence]) -> bool:
        """Give waiting sequences the highest priority that is present. Return whether any of them had a lower one.

        A sequence that already has the highest priority keeps its place. Do not call this while any sequence is skipped.
        """
        if len(self._levels) < 2:
            return False
        top = min(self._levels)
        lower = [sequence for sequence in sequences if sequence.priority > top]
        for sequence in lower:
            self._raise(sequence, top)
        return bool(lower)

    def skip(self, sequence: Sequence) -> None:
        """Skip the whole adapter flow of a sequence until `unskip_all`."""
        placement = self._placements[sequence]
        self._skipped.append(placement)
        placement.tenant.flows.skip(placement.flow)

    def unskip_all(self) -> None:
        """End `skip` for all flows."""
        for placement in self._skipped:
            placement.tenant.flows.unskip(placement.flow)
            placement.level.unskip(placement.tenant)
        self._skipped.clear()

    def start(self, sequence: Sequence) -> None:
        """Note that a waiting sequence starts to run."""
        placement = self._placements[sequence]
        for flow in (placement.tenant, placement.flow):
            flow.num_running += 1
        self._dequeue(sequence, placement)

    def requeue(self, sequence: Sequence) -> None:
        """Put a running sequence back into the queue, at the front of its flow."""
        placement = self._placements[sequence]
        self._enqueue(sequence, placement, is_first=True)
        for flow in (placement.tenant, placement.flow):
            flow.num_running -= 1

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Charge tokens to the tenant and the adapter flow of a sequence."""
        placement = self._placements[sequence]
        placement.tenant.charge(num_tokens)
        placement.flow.charge(num_tokens)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that waits or runs."""
        placement = self._placements.pop(sequence)
        if sequence in placement.flow.queue:
            self._dequeue(sequence, placement)
        else:
            for flow in (placement.tenant, placement.flow):
                flow.num_running -= 1
        self._drop_idle(placement)

    def tokens_charged(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """Return the tokens charged to each active flow since it became active, by tenant and adapter digests."""
        charged: dict[tuple[str, tuple[str, ...]], int] = {}
        for level in self._levels.values():
            for tenant in level.active.values():
                for flow in tenant.flows.active.values():
                    key = (tenant.name, flow.adapters)
                    charged[key] = charged.get(key, 0) + flow.num_tokens
        return charged

    def check_integrity(self, waiting: set[Sequence], running: set[Sequence]) -> None:
        """Assert that exactly these sequences wait and run, and that no idle flow is kept."""
        assert self._placements.keys() == waiting | running
        assert not self._skipped
        for level in self._levels.values():
            assert level.active
            for tenant in level.active.values():
                placements = {s: p for s, p in self._placements.items() if p.tenant is tenant}
                _check_counts(tenant, placements.keys() & waiting, placements.keys() & running)
                for flow in tenant.flows.active.values():
                    sequences = {s for s, p in placements.items() if p.flow is flow}
                    assert sequences & waiting == flow.queue.keys()
                    _check_counts(flow, sequences & waiting, sequences & running)

    def _make_placement(self, sequence: Sequence) -> _Placement:
        name, priority = sequence.request.tenant, sequence.priority
        level = self._levels.setdefault(priority, VirtualTokenQueue())
        tenant = level.get_or_add(name, lambda: TenantFlow(name=name))
        adapters = tuple(digest for digest, _ in sequence.residents)
        is_raised = sequence.is_raised
        flow = tenant.flows.get_or_add((adapters, is_raised), lambda: AdapterFlow(adapters=adapters, is_raised=is_raised))
        return _Placement(priority, level, tenant, flow)

    def _raise(self, sequence: Sequence, priority: int) -> None:
        sequence.priority = priority
        if placement := self._placements.pop(sequence, None):  # else it is a choice that follows another one, and is added later
            self._dequeue(sequence, placement)
            self._drop_idle(placement)
            self.add(sequence)

    def _enqueue(self, sequence: Sequence, placement: _Placement, is_first: bool) -> None:
        placement.level.add_waiting(placement.tenant)
        placement.tenant.flows.add_waiting(placement.flow)
        placement.flow.queue[sequence] = None
        if is_first:
            placement.flow.queue.move_to_end(sequence, last=False)

    def _dequeue(self, sequence: Sequence, placement: _Placement) -> None:
        del placement.flow.queue[sequence]
        placement.tenant.flows.remove_waiting(placement.flow)
        placement.level.remove_waiting(placement.tenant)

    def _drop_idle(self, placement: _Placement) -> None:
        placement.tenant.flows.drop_idle((placement.flow.adapters, placement.flow.is_raised))
        placement.level.drop_idle(placement.tenant.name)
        if not placement.level.active:
            del self._levels[placement.priority]


def _check_counts(flow: Flow, waiting: set[Sequence], running: set[Sequence]) -> None:
    assert (flow.num_waiting, flow.num_running) == (len(waiting), len(running))
    assert flow.is_active
    assert not flow.is_skipped
