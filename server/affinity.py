"""Affinity routing: a request goes to the replica that has its adapters, unless that has far more load than the others.

Rendezvous hashing (Thaler and Ravishankar 1998) ranks the replicas for each set of adapters, so a replica that comes or goes only
moves its own share. The load is bounded as in Mirrokni, Thorup and Zadimoghaddam 2016 (arXiv 1608.01350). Knows no Ray and no
HTTP.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lori.merge_options import MAX_ADAPTERS
from lori.names import AUTO, NAME
from server.schemas.model_names import find_parts

ANY = ""
"""The key of a request that names no adapter, for the least loaded replica."""


@dataclass(frozen=True, slots=True)
class LoadBound:
    """The bound on the requests under way at a replica. Above it, requests for its adapters go to their next replica."""

    share: float = 1.5
    """The bound as a multiple of the mean over the replicas."""
    floor: int = 8
    """The least bound: with few requests the mean says little, and a batch of this size takes hardly longer than one request."""

    def limit(self, loads: Iterable[int]) -> int:
        """Return the bound for one more request, given the requests under way at each replica."""
        loads = list(loads)
        return max(self.floor, math.ceil(self.share * (sum(loads) + 1) / len(loads)))


def key_of(names: Iterable[str]) -> str:
    """Return the key of a set of adapter names, independent of their order; `ANY` for none."""
    return "+".join(sorted(set(names)))


def adapter_names(body: Mapping[str, object], base_model: str) -> Iterator[str]:
    """Yield the names of the adapters in a body's fields, without versions. Skips everything that cannot be an adapter's name.

    A field with more than `MAX_ADAPTERS` names is not parsed: no replica accepts it, and other requests would wait meanwhile.
    """
    for field in ("adapter", "adapters"):
        value = body.get(field)
        items = value if isinstance(value, (list, tuple)) else [value]
        for item in items if len(items) <= MAX_ADAPTERS else ():
            reference = item.get("name") if isinstance(item, dict) else item
            if isinstance(reference, str) and NAME.fullmatch(name := reference.partition("@")[0]) and name != AUTO:
                yield name
    if isinstance(model := body.get("model"), str) and model not in (base_model, AUTO) and model.count("+") < MAX_ADAPTERS:
        yield from (part["reference"].partition("@")[0] for part in find_parts(model) if part)


def ranked(key: str, replicas: Iterable[str]) -> Sequence[str]:
    """Return the replicas in the order in which they should have the adapters of `key`.

    The order is the same in every process.
    """
    return sorted(replicas, key=lambda replica: _weight(key, replica), reverse=True)


def preferred(key: str, loads: Mapping[str, int], bound: LoadBound) -> Sequence[str]:
    """Return the replicas in the order in which a request of `key` should try them: those within the bound come first.

    `loads` has the requests under way at each replica. For `ANY`, and above the bound, the least loaded replica comes first.
    """
    if not loads:
        return []
    limit = 0 if key == ANY else bound.limit(loads.values())
    order = {replica: place for place, replica in enumerate(ranked(key, loads))}
    return sorted(loads, key=lambda replica: (max(0, loads[replica] + 1 - limit), order[replica]))


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key}\n{replica}".encode(), digest_size=8).digest()
