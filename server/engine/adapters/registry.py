"""The registry: every adapter that a server can load, by name, version and alias, and the names a request may use."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lori.errors import AdapterError, UnknownAdapterError, shortened, shown_faults
from lori.names import split_reference, unknown_adapter
from lori.printable import printable
from lori.store.entry import Entry
from lori.summary import Summary
from server.engine.request import Request

MAX_CALLERS = 32
"""Whose names are kept: to go through thousands takes milliseconds, and each request for an unknown one needs them."""


@dataclass(frozen=True, slots=True)
class Registered:
    """One version of an adapter on disk, under the name that it is asked for by."""

    entry: Entry
    summary: Summary

    @property
    def names(self) -> frozenset[str]:
        """Its name, and its owner's where that is an alias."""
        return frozenset((self.summary.name, self.owner))

    @property
    def owner(self) -> str:
        """The adapter that its files are of: another name, where its own is an alias."""
        return self.entry.folder.name.partition("@")[0]

    def entries(self) -> Iterator[Entry]:
        """Yield where its files may be: a folder as its maker left it is renamed when a version of its name is published."""
        yield self.entry
        kept = replace(self.entry, folder=self.entry.folder.with_name(f"{self.owner}@{self.summary.version}"))
        if kept.folder != self.entry.folder and kept.folder.is_dir():
            yield kept


@dataclass(frozen=True, slots=True)
class Faulty:
    """A damaged adapter, version or alias of a store, which cannot be served."""

    reference: str
    """`name`, `name@version`, or a folder name that is not a valid adapter name."""
    folder: str
    """Its folder's name in the store; empty if the name resolves to none."""
    faults: tuple[str, ...]
    """As clients may read them: each in one short line, without a path of this machine."""

    @classmethod
    def of(cls, reference: str, folder: str, faults: Sequence[str]) -> "Faulty":
        """Return it with the first of `faults`, whose text may be that of a file."""
        return cls(shortened(printable(reference)), folder, shown_faults([*map(printable, faults)]))

    @property
    def name(self) -> str:
        """Without the version."""
        return self.reference.partition("@")[0]

    def is_meant_by(self, reference: str) -> bool:
        """Whether `name@` and a version's first digits mean this. True where its own version is not known."""
        name, _, digits = reference.partition("@")
        version = (self.reference if "@" in self.reference else self.folder).partition("@")[2]
        return name == self.name and (not version or version.startswith(digits))


@dataclass(frozen=True, slots=True)
class _Tables:
    by_name: Mapping[str, Registered]
    versions: Mapping[str, tuple[Registered, ...]]
    by_digest: Mapping[str, tuple[Registered, ...]]
    usable: dict[Callable[[str], bool], Sequence[str]] = field(default_factory=dict)
    """Names in order, by who may use them."""


class Registry:
    """Registered adapters by name, by version, and by the digest of their content.

    Any thread may read it. One at a time may change it: the tables are replaced whole, so a reader sees one state or the next.
    """

    def __init__(self, adapters: Iterable[Registered], others: Iterable[Registered] = ()) -> None:
        """`adapters` are what names mean now; `others` are versions that are asked for as `name@version` alone."""
        current = {of.summary.name: of for of in adapters}
        self._tables = _Tables(current, *_found_by([*current.values(), *others]))
        self._faulty: Mapping[str, Faulty] = {}

    @property
    def by_name(self) -> Mapping[str, Registered]:
        """What each name means now."""
        return self._tables.by_name

    def names_for(self, may_use: Callable[[str], bool]) -> Sequence[str]:
        """Return in order the names that a caller may use. They are kept until adapters change, or too many others ask."""
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
        """What cannot be served, by reference. No name is here and in `by_name`."""
        return self._faulty

    def fault_of(self, reference: str) -> Faulty | None:
        """Return what is damaged and meant by `reference`, a name or `name@version`, or None."""
        if "@" not in reference:
            return self._faulty.get(reference)
        return next((faulty for faulty in self._faulty.values() if faulty.is_meant_by(reference)), None)

    def note_faulty(self, faulty: Iterable[Faulty]) -> None:
        """Add damaged adapters. One whose reference can be served is left out."""
        self._faulty = {**self._faulty, **{one.reference: one for one in faulty if one.reference not in self.by_name}}

    def clear_faults(self, references: Collection[str]) -> None:
        """Forget what is damaged of these: names, with all their versions, or `name@version`."""
        self._faulty = {
            reference: faulty
            for reference, faulty in self._faulty.items()
            if not {reference, faulty.name, faulty.folder} & {*references}
        }

    def versions(self, name: str) -> Sequence[Registered]:
        """Return the versions of `name`; none where the name is not known."""
        return self._tables.versions.get(name, ())

    def find(self, digest: str, names: Collection[str]) -> Sequence[Registered]:
        """Return the adapters of this content, first those of `names`; none where all are forgotten."""
        return sorted(self._tables.by_digest.get(digest, ()), key=lambda of: of.summary.name not in names)

    def has(self, name: str, digest: str) -> bool:
        """Whether this content can be asked for by this name, as what it means or by version."""
        return any(of.summary.digest == digest for of in self.versions(name))

    def put(self, adapter: Registered, others: Sequence[Registered] = ()) -> Sequence[Registered]:
        """Make the adapter's name mean it, and `others`, of the same name, what can be asked for by version beside it.

        Returns what of the name can be asked for no more; it is found by digest until it is forgotten.
        """
        tables, name = self._tables, adapter.summary.name
        versions = (adapter, *(of for of in others if of.summary.digest != adapter.summary.digest))
        self._tables = _Tables(
            {**tables.by_name, name: adapter}, {**tables.versions, name: versions}, _with(tables.by_digest, versions)
        )
        sound = {name, *(f"{name}@{of.summary.version}" for of in versions)}
        self._faulty = {reference: faulty for reference, faulty in self._faulty.items() if reference not in sound}
        kept = {of.summary.digest for of in versions}
        return [of for of in tables.versions.get(name, ()) if of.summary.digest not in kept]

    def add(self, others: Iterable[Registered]) -> None:
        """Let versions be asked for by version that are not what their names mean."""
        tables, added = self._tables, [of for of in others if not self.has(of.summary.name, of.summary.digest)]
        versions = {**tables.versions}
        for of in added:
            versions[of.summary.name] = (*versions.get(of.summary.name, ()), of)
        self._tables = _Tables(tables.by_name, versions, _with(tables.by_digest, added))

    def withdraw(self, name: str) -> Sequence[Registered]:
        """Let a name and its versions be asked for no more, and returns them. They are found by digest until forgotten."""
        tables, gone = self._tables, self.versions(name)
        by_name = {key: of for key, of in tables.by_name.items() if key != name}
        self._tables = _Tables(by_name, {key: of for key, of in tables.versions.items() if key != name}, tables.by_digest)
        return gone

    def withdraw_version(self, gone: Registered) -> None:
        """Let a version that is not what its name means be asked for no more. It is found by digest until forgotten."""
        tables, name = self._tables, gone.summary.name
        assert gone.summary.digest != tables.by_name[name].summary.digest
        left = tuple(of for of in self.versions(name) if of.summary.digest != gone.summary.digest)
        self._tables = _Tables(tables.by_name, {**tables.versions, name: left}, tables.by_digest)

    def forget(self, gone: Registered) -> None:
        """Let what was withdrawn be found no more, unless it was put back: no request that names it is under way."""
        tables, digest = self._tables, gone.summary.digest
        if self.has(gone.summary.name, digest):
            return
        left = tuple(of for of in tables.by_digest.get(digest, ()) if of.summary.name != gone.summary.name)
        others = {key: of for key, of in tables.by_digest.items() if key != digest}
        self._tables = _Tables(tables.by_name, tables.versions, others | ({digest: left} if left else {}))


def _found_by(
    adapters: Iterable[Registered],
) -> tuple[Mapping[str, tuple[Registered, ...]], Mapping[str, tuple[Registered, ...]]]:
    versions: dict[str, dict[str, Registered]] = {}
    by_digest: dict[str, list[Registered]] = {}
    for of in adapters:
        if of.summary.digest not in (known := versions.setdefault(of.summary.name, {})):
            known[of.summary.digest] = of
            by_digest.setdefault(of.summary.digest, []).append(of)
    return {name: tuple(of.values()) for name, of in versions.items()}, {key: tuple(of) for key, of in by_digest.items()}


def _with(
    by_digest: Mapping[str, tuple[Registered, ...]], adapters: Iterable[Registered]
) -> Mapping[str, tuple[Registered, ...]]:
    found = {**by_digest}
    for adapter in adapters:
        others = (of for of in found.get(adapter.summary.digest, ()) if of.summary.name != adapter.summary.name)
        found[adapter.summary.digest] = (adapter, *others)
    return found


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
    """Return what `name` or `name@version` may mean: one, none, or several whose version begins so."""
    name, at, _ = reference.partition("@")
    if not at:
        return [found] if (found := registry.by_name.get(name)) else []
    try:
        name, version = split_reference(reference)
    except AdapterError:
        return []
    return [of for of in registry.versions(name) if version and of.summary.version.startswith(version)]


def resolve(registry: Registry, reference: str, may_use: MayUse) -> Registered:
    """Return what `name` or `name@version` means; the version's first digits will do.

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
    """Raise `UnknownAdapterError` where an adapter was withdrawn since the request was admitted; `PolicyError` for a policy."""
    if not all(registry.has(term.name, term.digest) for term in request.policy):
        raise PolicyError
    for term in request.terms:
        if not registry.has(term.name, term.digest):
            raise unknown(registry, term.reference, may_use)
