"""Who gives up a place for a tenant that has none. Knows nothing of blocks, adapters or steps."""

from collections import defaultdict
from collections.abc import Collection

from server.engine.request import Sequence


def owed_to(sequence: Sequence, running: Collection[Sequence]) -> list[Sequence]:
    """Returns who would give up their places for a sequence that waits, one after the other; `running` in order of joining.

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
