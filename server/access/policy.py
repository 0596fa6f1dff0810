"""Whether what a key file says of adapters can be: what is added to requests is there."""

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
"""Returns what a reference means: a name, `name@version` or an alias; None where it means nothing, or several things."""


def check_policies(
    keys: Keys, find: Find, names: Iterable[str], absence: Callable[[str], str] = "there is no adapter {!r}".format
) -> list[str]:
    """Return the faults of policies: adapters that are not there, or are there twice. The log hears of patterns without effect.

    `absence` says why `find` returns None for a reference. For `KeyRing.require`.
    """
    for said in _idle_patterns(keys, sorted(names)):
        logger.warning("%s", said)
    faults = []
    for name, tenant in keys.tenants.items():
        seen: dict[str, str] = {}
        for reference, _ in tenant.policy:
            found = find(reference)
            if found is None:
                faults.append(f"tenants.{name}.policy: {absence(reference)}")
            elif (first := seen.setdefault(found.digest, reference)) != reference:
                faults.append(f"tenants.{name}.policy: {first!r} and {reference!r} are the same adapter")
    return faults


def _idle_patterns(keys: Keys, names: Sequence[str]) -> Iterator[str]:
    # Patterns of adapters that are to come, or typos.
    for name, tenant in keys.tenants.items():
        for pattern in tenant.allowed:
            if pattern != "*" and not _fits(pattern, names):
                yield f"tenants.{name}.adapters: {pattern!r} fits no adapter"


def _fits(pattern: str, names: Sequence[str]) -> bool:
    # Of names in order those alone that begin as the pattern does: there are thousands of both, and a new key waits for this.
    beginning = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    following = (names[place] for place in range(bisect_left(names, beginning), len(names)))
    alike = takewhile(lambda name: name.startswith(beginning), following)
    return any(map(Caller(allowed=(pattern,)).may_use, alike))
