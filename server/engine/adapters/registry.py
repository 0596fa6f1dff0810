"""The registry: every adapter that a server can load, by name, version and alias, and the names that a request may use."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lori.errors import AdapterError, UnknownAdapterError, shortened, shown_faults
from lori.names import split_reference, unknown_adapter
from lori.printable import printable
from lori.store.entry import Entry
from lori.summary import Summary
from server.engine.request import Request

MAX_CALLERS = 32
"""Maximum number of callers whose usable names are cached. Filtering thousands of names takes milliseconds, and every request for
an unknown adapter needs them."""


@dataclass(frozen=True, slots=True)
class Registered:
    """One version of an adapter on disk, under the name that requests use."""

    entry: Entry
    summary: Summary

    @property
    def names(self) -> frozenset[str]:
        """The adapter's name, and for an alias also its owner's name."""
        return frozenset((self.summary.name, self.owner))

    @property
    def owner(self) -> str:
        """Name of the adapter that owns the files. For an alias, this is another name."""
        return self.entry.folder.name.partition("@")[0]

    def entries(self) -> Iterator[Entry]:
        """Yield the folders that may hold the files. Publishing a version of a name renames the name's unversioned folder."""
        yield self.entry
        versioned = replace(self.entry, folder=self.entry.folder.with_name(f"{self.owner}@{self.summary.version}"))
        if versioned.folder != self.entry.folder and versioned.folder.is_dir():
            yield versioned


@dataclass(frozen=True, slots=True)
class Faulty:
    """A damaged adapter, version or alias of a store, which cannot be served."""

    reference: str
    """`name`, `name@version`, or a folder name that is not a valid adapter name."""
    folder: str
    """Name of the folder in the store; empty if the reference resolves to none."""
    faults: tuple[str, ...]
    """Faults as clients may read them: each is one short line without a path of this machine."""

    @classmethod
    def from_faults(cls, reference: str, folder: str, faults: Sequence[str]) -> "Faulty":
        """Return a faulty adapter with the first of `faults`. Their text may come from a file, so it is sanitized."""
        return cls(shortened(printable(reference)), folder, shown_faults([*map(printable, faults)]))

    @property
    def name(self) -> str:
        """The reference's name, without the version."""
        return self.reference.partition("@")[0]

    def matches(self, reference: str) -> bool:
        """Whether `name@` with the first digits of a version refers to this adapter. True if its own version is unknown."""
        name, _, digits = reference.partition("@")
        version = (self.reference if "@" in self.reference else self.folder).partition("@")[2]
        return name == self.name and (not version or version.startswith(digits))


@dataclass(frozen=True, slots=True)
class _Tables:
    by_name: Mapping[str, Registered]
    versions: Mapping[str, tuple[Registered, ...]]
    by_digest: Mapping[str, tuple[Registered, ...]]
    usable: dict[Callable[[str], bool], Sequence[str]] = field(default_factory=dict)
    """Sorted names that a caller may use, by the caller's `may_use`."""


class Registry:
    """The registered adapters by name, by version, and by content digest.

    Any thread may read. Only one thread at a time may write: tables are replaced as a whole, so a reader sees the old or the new
    state.
    """

    def __init__(self, adapters: Iterable[Registered], others: Iterable[Registered] = ()) -> None:
        """`adapters` are the current versions of their names. `others` can be requested only as `name@version`."""
        current = {adapter.summary.name: adapter for adapter in adapters}
        self._tables = _Tables(current, *_index([*current.values(), *others]))
        self._faulty: Mapping[str, Faulty] = {}

    @property
    def by_name(self) -> Mapping[str, Registered]:
        """The current version of each name."""
        return self._tables.by_name

    def names_for(self, may_use: Callable[[str], bool]) -> Sequence[str]:
        """Return the sorted names that a caller may use. Cached until adapters change, or too many other callers ask."""
        tables = self._tables
        names = tables.usable.get(may_use)
        if names is None:
            names = sorted(filter(may_use, tables.by_name))
            if len(tables.usable) >= MAX_CALLERS:
                tables.usable.clear()
            tables.usable[may_use] = names
        return names

    @property
    def faulty(self) -> Mapping[str, Faulty]:
        """Faulty adapters by reference. No reference is in both `faulty` and `by_name`."""
        return self._faulty

    def find_faulty(self, reference: str) -> Faulty | None:
        """Return the faulty adapter that `reference` (`name` or `name@version`) refers to, or None."""
        if "@" not in reference:
            return self._faulty.get(reference)
        return next((faulty for faulty in self._faulty.values() if faulty.matches(reference)), None)

    def add_faulty(self, faulty: Iterable[Faulty]) -> None:
        """Add faulty adapters, except those whose reference can be served."""
        self._faulty = {
            **self._faulty,
            **{adapter.reference: adapter for adapter in faulty if adapter.reference not in self.by_name},
        }

    def remove_faulty(self, references: Collection[str]) -> None:
        """Remove the faults of these names, with all their versions, or of `name@version`."""
        self._faulty = {
            reference: faulty
            for reference, faulty in self._faulty.items()
            if not {reference, faulty.name, faulty.folder} & {*references}
        }

    def versions(self, name: str) -> Sequence[Registered]:
        """Return the versions of `name`; empty if the name is unknown."""
        return self._tables.versions.get(name, ())

    def find(self, digest: str, names: Collection[str]) -> Sequence[Registered]:
        """Return the adapters with this content digest, those of `names` first; empty if all are forgotten."""
        return sorted(self._tables.by_digest.get(digest, ()), key=lambda adapter: adapter.summary.name not in names)

    def has(self, name: str, digest: str) -> bool:
        """Whether this content can be requested under this name, as the current version or by version."""
        return any(adapter.summary.digest == digest for adapter in self.versions(name))

    def put(self, adapter: Registered, others: Sequence[Registered] = ()) -> Sequence[Registered]:
        """Make `adapter` the current version of its name. `others`, of the same name, can be requested by version beside it.

        Other names of these versions get the same entry and summary. Return the versions that can no longer be requested; they
        are found by digest until `forget`.
        """
        tables, name = self._tables, adapter.summary.name
        versions = (adapter, *(other for other in others if other.summary.digest != adapter.summary.digest))
        renamed = [copy for version in versions for copy in _under_other_names(tables, version)]
        by_name, by_version = {**tables.by_name, name: adapter}, {**tables.versions, name: versions}
        for copy in renamed:
            alias, digest = copy.summary.name, copy.summary.digest
            by_version[alias] = tuple(copy if one.summary.digest == digest else one for one in by_version[alias])
            if alias in by_name and by_name[alias].summary.digest == digest:  # none if its current version is damaged
                by_name[alias] = copy
        self._tables = _Tables(by_name, by_version, _with_adapters(tables.by_digest, [*renamed, *versions]))
        references = {name, *(f"{name}@{other.summary.version}" for other in versions)}
        self._faulty = {reference: faulty for reference, faulty in self._faulty.items() if reference not in references}
        digests = {other.summary.digest for other in versions}
        return [other for other in tables.versions.get(name, ()) if other.summary.digest not in digests]

    def add(self, others: Iterable[Registered]) -> None:
        """Add versions that can be requested only as `name@version`."""
        tables = self._tables
        new_adapters = [adapter for adapter in others if not self.has(adapter.summary.name, adapter.summary.digest)]
        versions = {**tables.versions}
        for adapter in new_adapters:
            versions[adapter.summary.name] = (*versions.get(adapter.summary.name, ()), adapter)
        self._tables = _Tables(tables.by_name, versions, _with_adapters(tables.by_digest, new_adapters))

    def withdraw(self, name: str) -> Sequence[Registered]:
        """Withdraw a name with all its versions and return them. They are no longer requestable, but found by digest."""
        tables, withdrawn = self._tables, self.versions(name)
        by_name = {key: value for key, value in tables.by_name.items() if key != name}
        self._tables = _Tables(by_name, {key: value for key, value in tables.versions.items() if key != name}, tables.by_digest)
        return withdrawn

    def withdraw_version(self, withdrawn: Registered) -> None:
        """Withdraw a version that is not the current one. It is no longer requestable, but found by digest until `forget`."""
        tables, name = self._tables, withdrawn.summary.name
        assert name not in tables.by_name or withdrawn.summary.digest != tables.by_name[name].summary.digest
        remaining = tuple(other for other in self.versions(name) if other.summary.digest != withdrawn.summary.digest)
        self._tables = _Tables(tables.by_name, {**tables.versions, name: remaining}, tables.by_digest)

    def forget(self, withdrawn: Registered) -> None:
        """Forget a withdrawn version, unless it was put back. No running request may use it."""
        tables, digest = self._tables, withdrawn.summary.digest
        if self.has(withdrawn.summary.name, digest):
            return
        remaining = tuple(
            adapter for adapter in tables.by_digest.get(digest, ()) if adapter.summary.name != withdrawn.summary.name
        )
        others = {key: adapters for key, adapters in tables.by_digest.items() if key != digest}
        self._tables = _Tables(tables.by_name, tables.versions, others | ({digest: remaining} if remaining else {}))


def _index(
    adapters: Iterable[Registered],
) -> tuple[Mapping[str, tuple[Registered, ...]], Mapping[str, tuple[Registered, ...]]]:
    versions: dict[str, dict[str, Registered]] = {}
    by_digest: dict[str, list[Registered]] = {}
    for adapter in adapters:
        if adapter.summary.digest not in (by_version := versions.setdefault(adapter.summary.name, {})):
            by_version[adapter.summary.digest] = adapter
            by_digest.setdefault(adapter.summary.digest, []).append(adapter)
    return {name: tuple(by_version.values()) for name, by_version in versions.items()}, {
        key: tuple(listed) for key, listed in by_digest.items()
    }


def _under_other_names(tables: _Tables, adapter: Registered) -> list[Registered]:
    """Return `adapter` under each other name that requests may use for the same version of the same owner."""
    name, digest = adapter.summary.name, adapter.summary.digest
    return [
        Registered(replace(adapter.entry, name=other.summary.name), replace(adapter.summary, name=other.summary.name))
        for other in tables.by_digest.get(digest, ())
        if other.owner == adapter.owner
        and other.summary.name != name
        and any(one.summary.digest == digest for one in tables.versions.get(other.summary.name, ()))
    ]


def _with_adapters(
    by_digest: Mapping[str, tuple[Registered, ...]], adapters: Iterable[Registered]
) -> Mapping[str, tuple[Registered, ...]]:
    index = {**by_digest}
    for adapter in adapters:
        others = (other for other in index.get(adapter.summary.digest, ()) if other.summary.name != adapter.summary.name)
        index[adapter.summary.digest] = (adapter, *others)
    return index


MayUse = Callable[[str], bool]
"""Whether a caller may use the adapters of a name. An alias is a name like any other."""


class AmbiguousVersionError(AdapterError):
    """The first digits of a version match several versions."""


class FaultyAdapterError(AdapterError):
    """A requested adapter is damaged. Clients read the message, so it has no path."""

    def __init__(self, faulty: Faulty) -> None:
        self.faults = faulty.faults
        super().__init__(f"adapter {faulty.reference!r} is damaged and cannot be served: {'; '.join(faulty.faults)}")


class PolicyError(Exception):
    """An adapter of a tenant's policy cannot be added. Clients read the message, so it names no adapter."""

    def __init__(self) -> None:
        super().__init__("the operator's adapters cannot be added to this request, and it is not served without them")


def candidates(registry: Registry, reference: str) -> Sequence[Registered]:
    """Return the adapters that `name` or `name@version` may refer to: none, one, or several with that version prefix."""
    name, separator, _ = reference.partition("@")
    if not separator:
        return [adapter] if (adapter := registry.by_name.get(name)) else []
    try:
        name, version = split_reference(reference)
    except AdapterError:
        return []
    return [adapter for adapter in registry.versions(name) if version and adapter.summary.version.startswith(version)]


def clashes(adapter: Registered, policy: Sequence[Registered]) -> bool:
    """Return whether `adapter` is one of the operator's adapters, under any name or in any version."""
    return any(adapter.summary.digest == one.summary.digest or adapter.names & one.names for one in policy)


def resolve(registry: Registry, reference: str, may_use: MayUse) -> Registered:
    """Return the adapter that `name` or `name@version` refers to. The first digits of a version are enough.

    An adapter that the caller may not use gives the same error, after the same work, as one that does not exist. Raises
    `UnknownAdapterError`, `FaultyAdapterError`, `AmbiguousVersionError`.
    """
    matching, is_allowed = candidates(registry, reference), may_use(reference.partition("@")[0])
    if not matching or not is_allowed:
        raise unknown_error(registry, reference, may_use)
    if len(matching) > 1:
        alternatives = " or ".join(f"{adapter.summary.name}@{adapter.summary.version}" for adapter in matching)
        raise AmbiguousVersionError(f"{reference!r} could be {alternatives}")
    return matching[0]


def unknown_error(registry: Registry, reference: str, may_use: MayUse) -> UnknownAdapterError | FaultyAdapterError:
    """Return the error for a `reference` that cannot be requested.

    It lists the faults if the adapter is damaged and the caller may use it. Otherwise it suggests similar names that the caller
    may use.
    """
    if may_use(reference.partition("@")[0]) and (faulty := registry.find_faulty(reference)):
        return FaultyAdapterError(faulty)
    return unknown_adapter(reference, registry.names_for(may_use))


def check_registered(registry: Registry, request: Request, may_use: MayUse) -> None:
    """Raise `UnknownAdapterError` if an adapter was withdrawn after the request's admission; `PolicyError` for a policy's."""
    if not all(registry.has(term.name, term.digest) for term in request.policy):
        raise PolicyError
    for term in request.terms:
        if not registry.has(term.name, term.digest):
            raise unknown_error(registry, term.reference, may_use)
