"""Which replica a request should go to: the one that has its adapters already, unless that has much more to do than the others.

Rendezvous hashing (Thaler and Ravishankar 1998) ranks the replicas for each set of adapters, so that one that comes or goes moves
its own share alone. The load is bounded as in Mirrokni, Thorup and Zadimoghaddam 2016 (arXiv 1608.01350). Knows no Ray, no HTTP.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ANY = ""
"""The key of a request that names no adapter: whichever replica has least to do."""


@dataclass(frozen=True, slots=True)
class LoadBound:
    """How many requests a replica may have under way before those of its adapters go to their next replica."""

    share: float = 1.5
    """Times the mean over the replicas."""
    floor: int = 8
    """So many in any case: with few requests the mean says little, and a batch of them takes hardly longer than one."""

    def limit(self, loads: Iterable[int]) -> int:
        """Return the bound for one more request, given how many each replica has."""
        loads = list(loads)
        return max(self.floor, math.ceil(self.share * (sum(loads) + 1) / len(loads)))


def key_of(names: Iterable[str]) -> str:
    """Return the key of a set of adapter names, whatever their order; `ANY` of none."""
    return "+".join(sorted(set(names)))


def ranked(key: str, replicas: Iterable[str]) -> Sequence[str]:
    """Return the replicas in the order in which they should have the adapters of `key`, the same in every process."""
    return sorted(replicas, key=lambda replica: _weight(key, replica), reverse=True)


def preferred(key: str, loads: Mapping[str, int], bound: LoadBound) -> Sequence[str]:
    """Return the replicas in the order in which a request of `key` should try them: those within the bound come first.

    `loads` has the requests that each has under way. Of `ANY`, and beyond the bound, the least loaded comes first.
    """
    if not loads:
        return []
    limit = 0 if key == ANY else bound.limit(loads.values())
    order = {replica: place for place, replica in enumerate(ranked(key, loads))}
    return sorted(loads, key=lambda replica: (max(0, loads[replica] + 1 - limit), order[replica]))


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key}\n{replica}".encode(), digest_size=8).digest()
