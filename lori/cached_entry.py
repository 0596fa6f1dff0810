"""One version of an adapter in a store that lies elsewhere: its files come when they are asked for."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lori.basis import Explicit
from lori.entry import Entry


class Source(Protocol):
    """Has the files of the folders in a store."""

    def held(self, folder: str) -> AbstractContextManager[Path]:
        """Gives the folder of that name with all its files, until the block ends."""

    def num_bytes(self, folder: str) -> int:
        """Returns what its files hold."""

    def card(self, folder: str) -> bytes:
        """Returns its card."""

    def file_faults(self, folder: str) -> list[str]:
        """Returns what is wrong with its files, as far as the store says so."""

    def basis(self, digest: str) -> Explicit:
        """Returns an explicit basis."""


@dataclass(frozen=True, slots=True)
class CachedEntry(Entry):
    """An `Entry` whose folder holds its config; the rest comes from `source` while it is held."""

    source: Source = field(kw_only=True, compare=False, repr=False)

    @property
    def num_bytes(self) -> int:
        """As `Entry.num_bytes`, of the files in the store."""
        return self.source.num_bytes(self.folder.name)

    @contextmanager
    def held(self) -> Iterator[Path]:
        """As `Entry.held`. Raises `AdapterFormatError` where its files are gone, `UnreachableError` where they do not come."""
        with self.source.held(self.folder.name) as folder:
            yield folder

    def card(self) -> bytes:
        """As `Entry.card`, as it is in the store now. Raises `UnreachableError` where it does not come."""
        return self.source.card(self.folder.name)

    def file_faults(self) -> list[str]:
        """As `Entry.file_faults`, of what the store says of its files; no weights are fetched to be looked at."""
        return self.source.file_faults(self.folder.name)

    def basis(self, digest: str) -> Explicit:
        """As `Entry.basis`. Raises as `held`, too."""
        return self.source.basis(digest)
