"""Whether what a key file says of adapters can be: what is added to requests is there."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from lori.summary import Summary
from server.access.caller import Caller
from server.access.keys import Keys

logger = logging.getLogger(__name__)


Find = Callable[[str], Summary | None]
"""Returns what a reference means: a name, `name@version` or an alias; None where it means nothing, or several things."""


def check_policies(keys: Keys, find: Find, names: Iterable[str]) -> list[str]:
    """Returns the faults of policies: adapters that are not there, or are there twice. The log hears of patterns without effect.

    For `KeyRing.require`.
    """
    for said in _idle_patterns(keys, list(names)):
        logger.warning("%s", said)
    faults = []
    for name, tenant in keys.tenants.items():
        seen: dict[str, str] = {}
        for reference, _ in tenant.policy:
            found = find(reference)
            if found is None:
                faults.append(f"tenants.{name}.policy: there is no adapter {reference!r}")
            elif (first := seen.setdefault(found.digest, reference)) != reference:
                faults.append(f"tenants.{name}.policy: {first!r} and {reference!r} are the same adapter")
    return faults


def _idle_patterns(keys: Keys, names: Sequence[str]) -> Iterator[str]:
    # Of adapters that are to come, or of a slip of the pen.
    for name, tenant in keys.tenants.items():
        for pattern in tenant.allowed:
            if pattern != "*" and not any(map(Caller(allowed=(pattern,)).may_use, names)):
                yield f"tenants.{name}.adapters: {pattern!r} fits no adapter"
