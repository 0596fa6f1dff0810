"""Shares of one service that compete for it: the one that was served least is first.

Virtual token counters (Sheng et al. 2024, "Fairness in serving large language models", arXiv 2401.00588, algorithm 2): a share
that begins to wait is lifted to the least counter among those that wait, so idleness earns no credit. One that is idle is
forgotten, unless it is ahead of the others: that it owes, and it could shake off its debt by being idle.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

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
        """Counts what it got."""
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
        """Returns the share of this key, made anew if it was idle."""
        share = self.members.get(key)
        if share is None:
            share = self.members[key] = make()
            share.counter = self._debts.pop(key, 0)
        return share

    def add_waiting(self, share: S) -> None:
        """Notes that one more of this share waits."""
        if not share.num_waiting:
            share.counter = max(share.counter, self._floor())
            share.serial = next(self._serials)
            share.num_waiting = 1
            self._enter(share)
        else:
            share.num_waiting += 1

    def remove_waiting(self, share: S) -> None:
        """Notes that one less of this share waits."""
        share.num_waiting -= 1
        if not share.num_waiting:
            self._last_waited = share

    def first(self) -> S | None:
        """Returns the least served of the shares that wait and are not aside; of equals the one that waits longest."""
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
        """Passes over a share until `bring_back`."""
        share.is_aside = True

    def bring_back(self, share: S) -> None:
        """Ends `put_aside`."""
        share.is_aside = False
        if share.num_waiting:
            self._enter(share)

    def drop_idle(self, key: Hashable) -> None:
        """Forgets the share of this key if it is idle, but what it owes to those that wait."""
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
