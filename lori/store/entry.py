"""Entries of a store: one version of an adapter each, in a local folder or in a remote store that is read on demand."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from lori.adapter import Adapter
from lori.basis import Explicit
from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError
from lori.format import CARD_FILE, WEIGHTS_FILE, file_faults, load_adapter, parse_statistics, read_config, read_file
from lori.identity import BaseIdentity
from lori.names import NUM_VERSION_DIGITS, is_reference
from lori.prompt_statistics import MAX_STATISTICS_BYTES, STATISTICS_FILE, PromptStatistics
from lori.store.bases import load_basis
from lori.store.files import discard, read_stored


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of an adapter in a store, not opened yet. `folder` is `name@version`, or `name` for an unversioned folder."""

    name: str
    folder: Path

    @property
    def version(self) -> str:
        """The version from the folder's name, else from its config. Raises `AdapterFormatError` as `read_config`."""
        in_name = self.folder.name.partition("@")[2]
        return in_name or read_config(self.folder).lori.content_digest[:NUM_VERSION_DIGITS]

    @property
    def reference(self) -> str:
        """`name@version`. Raises as `version`."""
        return f"{self.name}@{self.version}"

    @property
    def num_bytes(self) -> int:
        """Total size of the files; 0 if the folder is gone."""
        try:
            with os.scandir(self.folder) as items:
                return sum(item.stat(follow_symlinks=False).st_size for item in items if item.is_file(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return 0

    @contextmanager
    def acquire(self) -> Iterator[Path]:
        """Yield the folder with all its files. Nothing but a deletion of the adapter removes the files before the block ends."""
        yield self.folder

    def card(self) -> bytes:
        """Return the content of the card; empty if there is none. Raises `AdapterFormatError` if it cannot be read."""
        if not os.path.lexists(self.folder / CARD_FILE):
            return b""
        faults: list[str] = []
        card = read_file(self.folder, CARD_FILE, faults)
        if card is None:
            raise AdapterFormatError(str(self.folder), faults)
        return card

    def prompt_statistics(self, digest: str | None = None) -> PromptStatistics | None:
        """Return the statistics of the adapter's prompts; None without any. Raises as `parse_statistics`, and if unreadable."""
        if not os.path.lexists(self.folder / STATISTICS_FILE):
            return None
        try:
            content = read_stored(self.folder, STATISTICS_FILE, MAX_STATISTICS_BYTES)
        except OSError as error:
            raise AdapterFormatError(str(self.folder), [f"{STATISTICS_FILE} cannot be read: {error.strerror}"]) from error
        return parse_statistics(content, digest, str(self.folder))

    def remove_unsound_statistics(self) -> None:
        """Remove the statistics of the adapter's prompts if they are damaged, or of another adapter."""
        try:
            self.prompt_statistics(read_config(self.folder).lori.content_digest)
        except AdapterFormatError:
            discard(self.folder / STATISTICS_FILE)

    def file_faults(self) -> list[str]:
        """Return the faults of the files that show without reading them whole, see `lori.format.file_faults`."""
        return file_faults(self.folder)

    def basis(self, digest: str) -> Explicit:
        """Return the explicit basis with this digest. Raises as `load_basis`."""
        return load_basis(self.folder.parent, digest)

    def load(self, base: BaseIdentity | None = None) -> Adapter:
        """Read and check the adapter, see `lori.format.load_adapter`. The adapter gets this entry's name."""
        with self.acquire() as folder:
            adapter = load_adapter(folder, base)
        self.check_version(adapter.version)
        return replace(adapter, name=self.name)

    def check_version(self, version: str) -> None:
        """Raise `AdapterFormatError` if the folder's name has another version than `version`, that of its content."""
        in_name = self.folder.name.partition("@")[2]
        if in_name and in_name != version:
            raise AdapterFormatError(str(self.folder), [f"its version is {version}, expected {in_name}"])


@dataclass(frozen=True, slots=True)
class Scan:
    """The folders of a store that hold an adapter."""

    entries: Sequence[Entry]
    """Every version of every adapter, sorted by name. Includes links, which cannot be read."""
    misnamed: Sequence[str]
    """Folders whose names no adapter may have."""


def scan(root: Path, name: str | None = None) -> Scan:
    """Return the folders of the store `root` that hold an adapter; with `name`, only those of this adapter. Opens no file.

    Raises `AdapterError` if `root` cannot be read.
    """
    entries, misnamed = [], []
    try:
        with os.scandir(root) as items:
            matching = (item for item in items if name is None or item.name.partition("@")[0] == name)
            for item in filter(_is_adapter, matching):
                if is_reference(item.name):
                    entries.append(Entry(item.name.partition("@")[0], root / item.name))
                else:
                    misnamed.append(item.name)
    except OSError as error:
        raise AdapterError(f"{root} is no folder of adapters: {error.strerror}") from error
    return Scan(sorted(entries, key=lambda entry: (entry.name, entry.folder.name)), sorted(misnamed))


def has_adapter(folder: str) -> bool:
    """Return whether a folder holds an adapter, sound or damaged: it has a config or weights. Follows a link to the folder."""
    return any(_exists(os.path.join(folder, name)) for name in (CONFIG_FILE, WEIGHTS_FILE))  # faster than a `Path`


def is_version(folder: str) -> bool:
    """Return whether `folder` is the name of a version's folder, `name@version`."""
    return "@" in folder and is_reference(folder)


def _is_adapter(item: "os.DirEntry[str]") -> bool:
    if item.name.startswith("."):
        return False
    if item.is_symlink():
        return _may_be_adapter(item)
    if not item.is_dir(follow_symlinks=False):
        return False
    if not is_reference(item.name):
        return os.path.lexists(os.path.join(item.path, CONFIG_FILE))
    return is_version(item.name) or has_adapter(item.path)


def _may_be_adapter(link: "os.DirEntry[str]") -> bool:
    # A link is never read, but reported as a fault if it may be an adapter. A dangling link may be one; a link to a file is not.
    try:
        status = os.stat(link.path)
    except OSError:
        return is_reference(link.name)
    return stat.S_ISDIR(status.st_mode) and (is_version(link.name) or has_adapter(link.path))


def _exists(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # no permission to look into the folder; reading it will report the fault
        return True
    return True


class Source(Protocol):
    """Provider of the files in a store's folders."""

    def acquire(self, folder: str) -> AbstractContextManager[Path]:
        """Provide the folder of that name with all its files until the block ends."""

    def num_bytes(self, folder: str) -> int:
        """Return the total size of the folder's files."""

    def card(self, folder: str) -> bytes:
        """Return the content of the folder's card."""

    def file_faults(self, folder: str) -> list[str]:
        """Return the faults of the folder's files that show in the store's listing."""

    def basis(self, digest: str) -> Explicit:
        """Return an explicit basis."""


@dataclass(frozen=True, slots=True)
class CachedEntry(Entry):
    """An `Entry` whose local folder has only config and statistics. `source` provides the others while the entry is acquired."""

    source: Source = field(kw_only=True, compare=False, repr=False)

    @property
    def num_bytes(self) -> int:
        """Total size of the files in the store."""
        return self.source.num_bytes(self.folder.name)

    @contextmanager
    def acquire(self) -> Iterator[Path]:
        """Do as `Entry.acquire`. Raises `AdapterFormatError` if the files are gone, `UnreachableError` if the download fails."""
        with self.source.acquire(self.folder.name) as folder:
            yield folder

    def card(self) -> bytes:
        """Return the card that the store has now. Raises `UnreachableError` if the store cannot be reached."""
        return self.source.card(self.folder.name)

    def file_faults(self) -> list[str]:
        """Return the faults that show in the store's listing. Downloads no weights."""
        return self.source.file_faults(self.folder.name)

    def basis(self, digest: str) -> Explicit:
        """Return the explicit basis with this digest. Raises as `Entry.basis` and as `acquire`."""
        return self.source.basis(digest)


@dataclass(frozen=True, slots=True)
class Contents:
    """The names and aliases of a store, resolved."""

    current: Mapping[str, Entry]
    """Entry that each name or alias means, sorted by name. No entry was opened."""
    faults: Mapping[str, str]
    """Faults of names that mean nothing or are ambiguous, and of folders whose names no adapter may have."""
    brief: Mapping[str, str] = field(default_factory=dict)
    """Short form, without the alias's target, of those `faults` that quote an alias."""
