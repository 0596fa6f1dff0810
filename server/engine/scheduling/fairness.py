"""Whose turn it is among the sequences that wait: by priority, then by tokens served, then by arrival.

Within a priority tenants share the service equally, and within a tenant its flows do: the sequences that want the same adapters.
Sequences that were raised to a priority share it as flows of their own: a backlog of them delays nobody by more than its share.
Nothing here knows of blocks, slots or steps.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from server.engine.request import Sequence
from server.engine.scheduling.contest import Contest, Share


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
        """Queues a new sequence, at the end of its flow or before all others of it."""
        self._places[sequence] = place = self._place(sequence)
        self._wait(sequence, place, is_first)

    def first(self) -> Sequence | None:
        """Returns the sequence whose turn it is, of those that are not passed over."""
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
        """Leaves out the whole flow of a sequence until `bring_back`."""
        place = self._places[sequence]
        self._aside.append(place)
        place.tenant.flows.put_aside(place.flow)

    def bring_back(self) -> None:
        """Ends `pass_over` for all."""
        for place in self._aside:
            place.tenant.flows.bring_back(place.flow)
            place.level.bring_back(place.tenant)
        self._aside.clear()

    def take(self, sequence: Sequence) -> None:
        """Notes that a sequence that waited runs."""
        place = self._places[sequence]
        for share in (place.tenant, place.flow):
            share.num_running += 1
        self._wait_no_more(sequence, place)

    def put_back(self, sequence: Sequence) -> None:
        """Notes that a sequence that ran waits again, before all others of its flow."""
        place = self._places[sequence]
        self._wait(sequence, place, is_first=True)
        for share in (place.tenant, place.flow):
            share.num_running -= 1

    def serve(self, sequence: Sequence, num_tokens: int) -> None:
        """Counts tokens that a sequence got."""
        place = self._places[sequence]
        place.tenant.serve(num_tokens)
        place.flow.serve(num_tokens)

    def remove(self, sequence: Sequence) -> None:
        """Takes out a sequence that waits or runs."""
        place = self._places.pop(sequence)
        if sequence in place.flow.queue:
            self._wait_no_more(sequence, place)
        else:
            for share in (place.tenant, place.flow):
                share.num_running -= 1
        self._drop_idle(place)

    def tokens_served(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """Returns, by tenant and digests of adapters, the tokens that each active flow was served since it became active."""
        served: dict[tuple[str, tuple[str, ...]], int] = {}
        for level in self._levels.values():
            for tenant in level.members.values():
                for flow in tenant.flows.members.values():
                    key = (tenant.name, flow.adapters)
                    served[key] = served.get(key, 0) + flow.num_tokens
        return served

    def check_integrity(self, waiting: set[Sequence], running: set[Sequence]) -> None:
        """Asserts that these are the sequences that wait and run, and that nothing idle is kept."""
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
