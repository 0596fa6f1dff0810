"""The adapters that can be asked for: what is known of each before its weights are read, and where it is."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lori.entry import Entry
from lori.summary import Summary


@dataclass(frozen=True, slots=True)
class Registered:
    """One version of an adapter on disk, under the name that it is asked for by."""

    entry: Entry
    summary: Summary

    @property
    def names(self) -> frozenset[str]:
        """Its name, and the one of its folder where that is an alias."""
        return frozenset((self.summary.name, self.entry.folder.name.partition("@")[0]))


@dataclass(frozen=True, slots=True)
class _Tables:
    by_name: Mapping[str, Registered]
    versions: Mapping[str, tuple[Registered, ...]]
    by_digest: Mapping[str, tuple[Registered, ...]]


class Registry:
    """Registered adapters by name, by version, and by the digest of their content.

    Any thread may read it. One at a time may change it: the tables are replaced whole, so a reader sees one state or the next.
    """

    def __init__(self, adapters: Iterable[Registered], others: Iterable[Registered] = ()) -> None:
        """`adapters` are what names mean now; `others` are versions that are asked for as `name@version` alone."""
        current = {of.summary.name: of for of in adapters}
        self._tables = _Tables(current, *_found_by([*current.values(), *others]))

    @property
    def by_name(self) -> Mapping[str, Registered]:
        """What each name means now."""
        return self._tables.by_name

    def versions(self, name: str) -> Sequence[Registered]:
        """Returns the versions of `name`; none where the name is not known."""
        return self._tables.versions.get(name, ())

    def find(self, digest: str, names: Collection[str]) -> Sequence[Registered]:
        """Returns the adapters of this content, first those of `names`."""
        return sorted(self._tables.by_digest[digest], key=lambda of: of.summary.name not in names)

    def has(self, digest: str) -> bool:
        """Whether any name or version that can be asked for has this content."""
        return any(of in self.versions(of.summary.name) for of in self._tables.by_digest.get(digest, ()))

    def put(self, adapter: Registered) -> None:
        """Makes the adapter's name mean it; what the name meant can still be asked for by its version."""
        tables, name = self._tables, adapter.summary.name
        others = tuple(of for of in self.versions(name) if of.summary.digest != adapter.summary.digest)
        self._tables = _Tables(
            {**tables.by_name, name: adapter},
            {**tables.versions, name: (adapter, *others)},
            _with(tables.by_digest, adapter),
        )

    def withdraw(self, name: str) -> Sequence[Registered]:
        """Lets a name and its versions be asked for no more, and returns them. They are found by digest until forgotten."""
        tables, gone = self._tables, self.versions(name)
        by_name = {key: of for key, of in tables.by_name.items() if key != name}
        self._tables = _Tables(by_name, {key: of for key, of in tables.versions.items() if key != name}, tables.by_digest)
        return gone

    def forget(self, gone: Registered) -> None:
        """Lets what was withdrawn be found no more: no request that names it is under way."""
        tables, digest = self._tables, gone.summary.digest
        left = tuple(of for of in tables.by_digest.get(digest, ()) if of != gone)
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


def _with(by_digest: Mapping[str, tuple[Registered, ...]], adapter: Registered) -> Mapping[str, tuple[Registered, ...]]:
    others = tuple(of for of in by_digest.get(adapter.summary.digest, ()) if of.summary.name != adapter.summary.name)
    return {**by_digest, adapter.summary.digest: (adapter, *others)}
