"""The adapters that can be asked for: what is known of each before its weights are read, and where it is."""

from collections.abc import Mapping, Sequence
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
        self._by_digest = {of.summary.digest: of for of in adapters}

    def find(self, digest: str) -> Registered:
        """Returns an adapter of this content, under any of its names."""
        return self._by_digest[digest]
