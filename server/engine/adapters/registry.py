"""The adapters that can be asked for: what is known of each before its weights are read, and where it is."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lori.entry import Entry
from lori.summary import Summary


@dataclass(frozen=True, slots=True)
class Registered:
    """One adapter on disk."""

    entry: Entry
    summary: Summary


class Registry:
    """Registered adapters by name, and by the digest of their content. Read by any thread, never changed."""

    def __init__(self, adapters: Sequence[Registered]) -> None:
        self.by_name: Mapping[str, Registered] = {of.summary.name: of for of in adapters}
        self._by_digest: dict[str, list[Registered]] = {}
        for of in adapters:
            self._by_digest.setdefault(of.summary.digest, []).append(of)

    def summary(self, name: str) -> Summary | None:
        """Returns what is known of the adapter called `name`, or None where there is none."""
        return self.by_name[name].summary if name in self.by_name else None

    def find(self, digest: str, names: Collection[str]) -> Sequence[Registered]:
        """Returns the adapters of this content, first those of `names`."""
        return sorted(self._by_digest[digest], key=lambda of: of.summary.name not in names)
