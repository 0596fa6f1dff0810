"""Sequences whose merge waits for a place to be built in: tenants take turns, and each tenant's merges come in order of arrival.

Weights are free numbers, so one tenant can ask for any number of merges. They may delay its own, and nobody else's.
"""

from collections import OrderedDict
from collections.abc import Collection

from server.engine.request import Sequence


class MergeQueue:
    """A queue per tenant. Every operation takes the same time however many sequences wait."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[Sequence, None]] = OrderedDict()  # the one whose turn is next first

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._tenants.get(sequence.request.tenant, ())

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its tenant; one that is queued keeps its place."""
        self._tenants.setdefault(sequence.request.tenant, OrderedDict())[sequence] = None

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence out, if it is queued."""
        tenant = sequence.request.tenant
        queue = self._tenants.get(tenant)
        if queue is None:
            return
        queue.pop(sequence, None)
        if not queue:
            del self._tenants[tenant]

    def take(self, busy: Collection[str]) -> Sequence | None:
        """Take out and return the sequence whose turn it is; None when none is queued.

        The tenants in `busy`, of whom a merge is under way, have their turn after all others.
        """
        tenant = next((name for name in self._tenants if name not in busy), None)
        if tenant is None:
            tenant = next(iter(self._tenants), None)
        if tenant is None:
            return None
        self._tenants.move_to_end(tenant)
        sequence = next(iter(self._tenants[tenant]))
        self.discard(sequence)
        return sequence
