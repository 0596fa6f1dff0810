"""Checks of a key file against the adapters that exist: the adapters of a policy must be there."""

import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile

from lori.summary import Summary
from server.access.caller import Caller
from server.access.keys import Keys

logger = logging.getLogger(__name__)


Find = Callable[[str], Summary | None]
"""Function that returns the adapter of a reference (a name, `name@version` or an alias), or None if there is none or more than
one."""


def check_policies(
    keys: Keys, find: Find, names: Iterable[str], absence: Callable[[str], str] = "there is no adapter {!r}".format
) -> list[str]:
    """Return the faults of policies: adapters that do not exist, or that are named twice. Logs patterns that match nothing.

    `absence` says why `find` returns None for a reference. A check for `KeyRing.add_check`.
    """
    for message in _unused_patterns(keys, sorted(names)):
        logger.warning("%s", message)
    faults = []
    for name, tenant in keys.tenants.items():
        seen: dict[str, str] = {}
        for reference, _ in tenant.policy:
            summary = find(reference)
            if summary is None:
                faults.append(f"tenants.{name}.policy: {absence(reference)}")
            elif (first := seen.setdefault(summary.digest, reference)) != reference:
                faults.append(f"tenants.{name}.policy: {first!r} and {reference!r} are the same adapter")
    return faults


def _unused_patterns(keys: Keys, names: Sequence[str]) -> Iterator[str]:
    # Patterns for adapters that will come later, or typos.
    for name, tenant in keys.tenants.items():
        for pattern in tenant.allowed:
            if pattern != "*" and not _matches_any(pattern, names):
                yield f"tenants.{name}.adapters: {pattern!r} fits no adapter"


def _matches_any(pattern: str, names: Sequence[str]) -> bool:
    # Looks only at the sorted names that begin as the pattern does: there may be thousands of names and of patterns, and a new
    # key waits for this check.
    prefix = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    following = (names[place] for place in range(bisect_left(names, prefix), len(names)))
    candidates = takewhile(lambda name: name.startswith(prefix), following)
    return any(map(Caller(allowed=(pattern,)).may_use, candidates))
