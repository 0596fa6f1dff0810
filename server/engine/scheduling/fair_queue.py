"""The fair queue: the order of the sequences that wait, by priority, then by tokens served, then by arrival.

Virtual token counters (Sheng et al. 2024, "Fairness in serving large language models", arXiv 2401.00588, algorithm 2): a share
that begins to wait is lifted to the least counter among those that wait, so idleness earns no credit. An idle share is
forgotten, unless its counter is ahead of the others: it would shake off its debt by being idle.

Within a priority, tenants share the service equally. Within a tenant its flows do: a flow is the sequences on the same adapters.
Sequences raised to a priority form flows of their own there, so a backlog of them delays nobody by more than its share. Nothing
here knows of blocks, slots or steps.
"""

import heapq
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

from server.engine.request import Sequence


def owed_to(sequence: Sequence, running: Collection[Sequence]) -> list[Sequence]:
    """Return who would give up their places for a sequence that waits, one after the other; `running` in order of joining.

    It is the last of the tenant that has most then, which keeps one. Nobody where one of the sequence's own tenant runs, and none
    that is more urgent.
    """
    by_tenant = defaultdict(list)
    for other in running:
        by_tenant[other.request.tenant].append(other)
    if sequence.request.tenant in by_tenant:
        return []
    held: list[tuple[int, Sequence]] = []
    for of_tenant in by_tenant.values():
        less_urgent = [other for other in reversed(of_tenant) if other.priority >= sequence.priority]
        held += zip(range(len(of_tenant), 1, -1), less_urgent, strict=False)
    return [other for _, other in sorted(held, key=lambda pair: -pair[0])]


class Ageing:
    """The waiting sequences, by how long they have waited. A sequence stays overdue for the rest of its life."""

    def __init__(self, max_wait_s: float) -> None:
        """Set the wait after which a sequence is overdue, in seconds; infinite: none ever is."""
        self._max_wait_s = max_wait_s
        self._new: dict[Sequence, None] = {}
        self._since: OrderedDict[Sequence, float] = OrderedDict()  # the longest wait first
        self._overdue: dict[Sequence, None] = {}

    def begin(self, sequence: Sequence) -> None:
        """Note that a sequence waits from the next `overdue` on: a new one, or one that was preempted."""
        (self._overdue if sequence.is_overdue else self._new)[sequence] = None

    def end(self, sequence: Sequence) -> None:
        """Note that a sequence runs or has ended."""
        self._new.pop(sequence, None)
        self._since.pop(sequence, None)
        self._overdue.pop(sequence, None)

    def overdue(self, now: float) -> Collection[Sequence]:
        """Return the waiting sequences that are overdue; `now` is in monotonic seconds. Takes no time for those that are not."""
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


MAX_DEBTS = 256
"""How many idle shares are remembered; the one that is idle longest is forgotten first."""
MIN_COMPACT = 16


@dataclass(slots=True, eq=False)
class Share:
    """A claim to be served: active while something of it waits or runs."""

    num_tokens: int = 0
    """Served since it became active."""
    counter: int = 0
    """Its virtual counter, which only grows."""
    num_waiting: int = 0
    num_running: int = 0
    is_aside: bool = False
    """Waits but is passed over for now."""
    serial: int = 0
    is_entered: bool = False

    @property
    def is_active(self) -> bool:
        """Whether something of it waits or runs."""
        return self.num_waiting > 0 or self.num_running > 0

    def serve(self, num_tokens: int) -> None:
        """Count what it got."""
        self.num_tokens += num_tokens
        self.counter += num_tokens


S = TypeVar("S", bound=Share)


class Contest(Generic[S]):
    """The active shares of a service, by key."""

    def __init__(self) -> None:
        self.members: dict[Hashable, S] = {}
        # Of each share that waits one entry with a counter that it has had: brought up to date when it comes up.
        self._heap: list[tuple[int, int, S]] = []
        self._serials = count()
        self._last_waited: S | None = None
        self._debts: OrderedDict[Hashable, int] = OrderedDict()

    def member(self, key: Hashable, make: Callable[[], S]) -> S:
        """Return the share of this key, made anew if it was idle."""
        share = self.members.get(key)
        if share is None:
            share = self.members[key] = make()
            share.counter = self._debts.pop(key, 0)
        return share

    def add_waiting(self, share: S) -> None:
        """Note that one more of this share waits."""
        if not share.num_waiting:
            share.counter = max(share.counter, self._floor())
            share.serial = next(self._serials)
            share.num_waiting = 1
            self._enter(share)
        else:
            share.num_waiting += 1

    def remove_waiting(self, share: S) -> None:
        """Note that one less of this share waits."""
        share.num_waiting -= 1
        if not share.num_waiting:
            self._last_waited = share

    def first(self) -> S | None:
        """Return the least served of the shares that wait and are not aside; of equals the one that waits longest."""
        while self._heap:
            counter, serial, share = self._heap[0]
            if not share.num_waiting or share.is_aside:
                heapq.heappop(self._heap)
                share.is_entered = False
            elif (counter, serial) != (share.counter, share.serial):
                heapq.heapreplace(self._heap, (share.counter, share.serial, share))
            else:
                return share
        return None

    def put_aside(self, share: S) -> None:
        """Pass over a share until `bring_back`."""
        share.is_aside = True

    def bring_back(self, share: S) -> None:
        """End `put_aside`."""
        share.is_aside = False
        if share.num_waiting:
            self._enter(share)

    def drop_idle(self, key: Hashable) -> None:
        """Forget the share of this key if it is idle, but what it owes to those that wait."""
        if self.members[key].is_active:
            return
        counter = self.members.pop(key).counter
        floor = self._floor()
        if counter > floor:
            self._debts[key] = counter
        while self._debts and (len(self._debts) > MAX_DEBTS or next(iter(self._debts.values())) <= floor):
            self._debts.popitem(last=False)

    def _floor(self) -> int:
        share = self.first() or self._last_waited
        return share.counter if share else 0

    def _enter(self, share: S) -> None:
        if share.is_entered:
            return
        if len(self._heap) > 2 * len(self.members) + MIN_COMPACT:
            self._compact()
        share.is_entered = True
        heapq.heappush(self._heap, (share.counter, share.serial, share))

    def _compact(self) -> None:
        # Shares that ceased to wait while others were ahead of them are still in it.
        kept = []
        for entry in self._heap:
            share = entry[2]
            share.is_entered = share.num_waiting > 0
            if share.is_entered:
                kept.append(entry)
        heapq.heapify(kept)
        self._heap = kept


@dataclass(slots=True, eq=False)
class Flow(Share):
    """The sequences of one tenant and priority that want the same adapters, first come, first served."""

    adapters: tuple[str, ...] = ()
    """Their digests; none: the base alone."""
    is_raised: bool = False
    """Whether they are of a lower priority than that in which they compete, see `FairQueue.raise_to_top`."""
    queue: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)


@dataclass(slots=True, eq=False)
class Tenant(Share):
    """A tenant's share within a priority, and what shares in it."""

    name: str = ""
    flows: Contest[Flow] = field(default_factory=Contest)


@dataclass(frozen=True, slots=True)
class _Place:
    # Where a sequence that waits or runs belongs.
    priority: int
    level: Contest[Tenant]
    tenant: Tenant
    flow: Flow


class FairQueue:
    """Keeps the sequences that wait in order, and counts what those that run are served."""

    def __init__(self) -> None:
        self._levels: dict[int, Contest[Tenant]] = {}
        self._places: dict[Sequence, _Place] = {}
        self._aside: list[_Place] = []

    def add(self, sequence: Sequence, *, is_first: bool = False) -> None:
        """Queue a new sequence, at the end of its flow or before all others of it."""
        self._places[sequence] = place = self._place(sequence)
        self._wait(sequence, place, is_first)

    def first(self) -> Sequence | None:
        """Return the sequence whose turn it is, of those that are not passed over."""
        for priority in sorted(self._levels):
            level = self._levels[priority]
            while tenant := level.first():
                if flow := tenant.flows.first():
                    return next(iter(flow.queue))
                level.put_aside(tenant)  # until one of its flows is brought back
        return None

    def raise_to_top(self, sequences: Iterable[Sequence]) -> bool:
        """Give waiting sequences the highest priority that is present, and return whether any had a lower one.

        One that has it keeps its place. Not to be called while any are passed over.
        """
        if len(self._levels) < 2:
            return False
        top = min(self._levels)
        lower = [sequence for sequence in sequences if sequence.priority > top]
        for sequence in lower:
            self._raise(sequence, top)
        return bool(lower)

    def pass_over(self, sequence: Sequence) -> None:
        """Leave out the whole flow of a sequence until `bring_back`."""
        place = self._places[sequence]
        self._aside.append(place)
        place.tenant.flows.put_aside(place.flow)

    def bring_back(self) -> None:
        """End `pass_over` for all."""
        for place in self._aside:
            place.tenant.flows.bring_back(place.flow)
            place.level.bring_back(place.tenant)
        self._aside.clear()

    def take(self, sequence: Sequence) -> None:
        """Note that a sequence that waited runs."""
        place = self._places[sequence]
        for share in (place.tenant, place.flow):
            share.num_running += 1
        self._wait_no_more(sequence, place)

    def put_back(self, sequence: Sequence) -> None:
        """Note that a sequence that ran waits again, before all others of its flow."""
        place = self._places[sequence]
        self._wait(sequence, place, is_first=True)
        for share in (place.tenant, place.flow):
            share.num_running -= 1

    def serve(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens that a sequence got."""
        place = self._places[sequence]
        place.tenant.serve(num_tokens)
        place.flow.serve(num_tokens)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that waits or runs."""
        place = self._places.pop(sequence)
        if sequence in place.flow.queue:
            self._wait_no_more(sequence, place)
        else:
            for share in (place.tenant, place.flow):
                share.num_running -= 1
        self._drop_idle(place)

    def tokens_served(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """Return, by tenant and digests of adapters, the tokens that each active flow was served since it became active."""
        served: dict[tuple[str, tuple[str, ...]], int] = {}
        for level in self._levels.values():
            for tenant in level.members.values():
                for flow in tenant.flows.members.values():
                    key = (tenant.name, flow.adapters)
                    served[key] = served.get(key, 0) + flow.num_tokens
        return served

    def check_integrity(self, waiting: set[Sequence], running: set[Sequence]) -> None:
        """Assert that these are the sequences that wait and run, and that nothing idle is kept."""
        assert self._places.keys() == waiting | running
        assert not self._aside
        for level in self._levels.values():
            assert level.members
            for tenant in level.members.values():
                places = {s: p for s, p in self._places.items() if p.tenant is tenant}
                _check_counts(tenant, places.keys() & waiting, places.keys() & running)
                for flow in tenant.flows.members.values():
                    own = {s for s, p in places.items() if p.flow is flow}
                    assert own & waiting == flow.queue.keys()
                    _check_counts(flow, own & waiting, own & running)

    def _place(self, sequence: Sequence) -> _Place:
        name, priority = sequence.request.tenant, sequence.priority
        level = self._levels.setdefault(priority, Contest())
        tenant = level.member(name, lambda: Tenant(name=name))
        adapters = tuple(digest for digest, _ in sequence.residents)
        is_raised = sequence.is_raised
        flow = tenant.flows.member((adapters, is_raised), lambda: Flow(adapters=adapters, is_raised=is_raised))
        return _Place(priority, level, tenant, flow)

    def _raise(self, sequence: Sequence, priority: int) -> None:
        sequence.priority = priority
        if place := self._places.pop(sequence, None):  # else it is one of several choices, and is added later
            self._wait_no_more(sequence, place)
            self._drop_idle(place)
            self.add(sequence)

    def _wait(self, sequence: Sequence, place: _Place, is_first: bool) -> None:
        place.level.add_waiting(place.tenant)
        place.tenant.flows.add_waiting(place.flow)
        place.flow.queue[sequence] = None
        if is_first:
            place.flow.queue.move_to_end(sequence, last=False)

    def _wait_no_more(self, sequence: Sequence, place: _Place) -> None:
        del place.flow.queue[sequence]
        place.tenant.flows.remove_waiting(place.flow)
        place.level.remove_waiting(place.tenant)

    def _drop_idle(self, place: _Place) -> None:
        place.tenant.flows.drop_idle((place.flow.adapters, place.flow.is_raised))
        place.level.drop_idle(place.tenant.name)
        if not place.level.members:
            del self._levels[place.priority]


def _check_counts(share: Share, waiting: set[Sequence], running: set[Sequence]) -> None:
    assert (share.num_waiting, share.num_running) == (len(waiting), len(running))
    assert share.is_active
    assert not share.is_aside
