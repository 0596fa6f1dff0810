"""Which adapters a request has: what its caller may name, and what the operator adds. No tensor, no HTTP.

An adapter that a caller may not use does not exist for it: the same error, the same text, the same work.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from lori.names import unknown_adapter
from server.access.caller import Caller
from server.access.keys import Keys

logger = logging.getLogger(__name__)


class Named(Protocol):
    """An adapter, as far as anybody here looks."""

    @property
    def name(self) -> str:
        """Its own, whatever alias it was found by."""

    @property
    def digest(self) -> str:
        """Of its content."""


A = TypeVar("A", bound=Named)
Find = Callable[[str], A | None]
"""Returns what a reference means: a name, `name@version` or an alias; None where it means nothing."""


class NamesPolicyError(Exception):
    """A client names an adapter that the operator adds to its requests: it would change its weight."""


class PolicyError(Exception):
    """What the operator adds cannot be added. Nothing is served without it."""


def choose(
    caller: Caller, asked: Sequence[str], find: Find[A], names: Iterable[str]
) -> tuple[Sequence[A], Sequence[tuple[A, float]]]:
    """Returns the adapters that the caller asked for, one for each of `asked`, and those of its policy with their weights.

    `names` are all that there are. Raises `UnknownAdapterError`, `NamesPolicyError` or `PolicyError`.
    """
    policy = _policy(caller, find)
    added_names, added_digests = {of.name for of, _ in policy}, {of.digest for of, _ in policy}
    chosen = []
    for reference in asked:
        found = find(reference)
        is_added = found is not None and found.name in added_names
        # What may be used only under another name is added, too; what may not be used is unknown before it is anything else.
        if not is_added:
            found = _usable(caller, reference, found, names)
        if found is None or is_added or found.digest in added_digests:
            raise NamesPolicyError(f"adapter: names {reference!r}, which the operator adds to every request of {caller.tenant!r}")
        chosen.append(found)
    return chosen, policy


def find_usable(caller: Caller, reference: str, find: Find[A], names: Iterable[str]) -> A:
    """Returns the adapter that `reference` means. Raises `UnknownAdapterError` where there is none that the caller may use."""
    return _usable(caller, reference, find(reference), names)


def _usable(caller: Caller, reference: str, found: A | None, names: Iterable[str]) -> A:
    may_use = caller.may_use(reference.partition("@")[0] if found is None else found.name)
    if found is None or not may_use:
        raise unknown_adapter(reference, filter(caller.may_use, names))
    return found


def _policy(caller: Caller, find: Find[A]) -> Sequence[tuple[A, float]]:
    found = [(reference, find(reference), weight) for reference, weight in caller.policy]
    missing = [reference for reference, adapter, _ in found if adapter is None]
    if missing:
        logger.error("requests of tenant %r fail: its policy names %s, which is not there", caller.tenant, ", ".join(missing))
        raise PolicyError("the operator's adapters cannot be added to this request, and it is not served without them")
    return [(adapter, weight) for _, adapter, weight in found if adapter is not None]


def check_policies(keys: Keys, find: Find[Named], names: Iterable[str]) -> list[str]:
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
