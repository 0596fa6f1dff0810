"""Which adapters the names in a request mean, for a caller who may use some of those that are registered."""

from collections.abc import Callable, Sequence

from lori.errors import AdapterError, UnknownAdapterError
from lori.names import split_reference, unknown_adapter
from server.engine.adapters.registry import Faulty, Registered, Registry
from server.engine.request import Request

MayUse = Callable[[str], bool]
"""Whether the caller may use the adapters of a name; an alias is a name as any other."""


class AmbiguousVersionError(AdapterError):
    """The first digits of a version could be several."""


class FaultyAdapterError(AdapterError):
    """An adapter was asked for that lies in the store and is damaged. A client reads it: it names no path."""

    def __init__(self, faulty: Faulty) -> None:
        self.faults = faulty.faults
        super().__init__(f"adapter {faulty.reference!r} is damaged and cannot be served: {'; '.join(faulty.faults)}")


class PolicyError(Exception):
    """What the operator adds to every request of a tenant cannot be added. A client reads it: it names no adapter."""

    def __init__(self) -> None:
        super().__init__("the operator's adapters cannot be added to this request, and it is not served without them")


def meanings(registry: Registry, reference: str) -> Sequence[Registered]:
    """Returns what `name` or `name@version` may mean: one, none, or several whose version begins so."""
    name, at, _ = reference.partition("@")
    if not at:
        return [found] if (found := registry.by_name.get(name)) else []
    try:
        name, version = split_reference(reference)
    except AdapterError:
        return []
    return [of for of in registry.versions(name) if version and of.summary.version.startswith(version)]


def resolve(registry: Registry, reference: str, may_use: MayUse) -> Registered:
    """Returns what `name` or `name@version` means; the version's first digits will do.

    What the caller may not use is as unknown as what there is not: the same error, the same work. Raises `UnknownAdapterError`,
    `FaultyAdapterError`, `AmbiguousVersionError`.
    """
    found, is_allowed = meanings(registry, reference), may_use(reference.partition("@")[0])
    if not found or not is_allowed:
        raise unknown(registry, reference, may_use)
    if len(found) > 1:
        said = " or ".join(f"{of.summary.name}@{of.summary.version}" for of in found)
        raise AmbiguousVersionError(f"{reference!r} could be {said}")
    return found[0]


def unknown(registry: Registry, reference: str, may_use: MayUse) -> UnknownAdapterError | FaultyAdapterError:
    """Return the error for a `reference` that cannot be asked for.

    It has its faults where it is damaged and the caller may use it, else names that the caller may use and that look like it.
    """
    if may_use(reference.partition("@")[0]) and (faulty := registry.fault_of(reference)):
        return FaultyAdapterError(faulty)
    return unknown_adapter(reference, registry.names_for(may_use))


def check_registered(registry: Registry, request: Request, may_use: MayUse) -> None:
    """Raises `UnknownAdapterError` where an adapter was withdrawn since the request was admitted; `PolicyError` for a policy."""
    if not all(registry.has(term.name, term.digest) for term in request.policy):
        raise PolicyError
    for term in request.terms:
        if not registry.has(term.name, term.digest):
            raise unknown(registry, term.reference, may_use)
