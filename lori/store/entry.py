"""An entry of a store: one version of an adapter, in a folder here or in a store elsewhere whose files are fetched on demand."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from lori.adapter import Adapter
from lori.basis import Explicit
from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError
from lori.format import CARD_FILE, WEIGHTS_FILE, file_faults, load_adapter, read_config, read_file
from lori.identity import BaseIdentity
from lori.names import NAME, NUM_VERSION_DIGITS, VERSION
from lori.store.bases import load_basis


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of an adapter in a store, not opened yet. `folder` is `name@version`, or `name` as its maker left it."""

    name: str
    folder: Path

    @property
    def version(self) -> str:
        """Its version; the config of a folder without one in its name is read. Raises `AdapterFormatError` as `read_config`."""
        in_name = self.folder.name.partition("@")[2]
        return in_name or read_config(self.folder).lori.content_digest[:NUM_VERSION_DIGITS]

    @property
    def reference(self) -> str:
        """`name@version`. Raises as `version`."""
        return f"{self.name}@{self.version}"

    @property
    def num_bytes(self) -> int:
        """What its files hold, in bytes; 0 where there are none any more."""
        try:
            with os.scandir(self.folder) as items:
                return sum(item.stat(follow_symlinks=False).st_size for item in items if item.is_file(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return 0

    @contextmanager
    def held(self) -> Iterator[Path]:
        """Yield the folder with all its files, which nothing takes away before the block ends but who deletes the adapter."""
        yield self.folder

    def card(self) -> bytes:
        """Return its card; nothing where it has none. Raises `AdapterFormatError` where it cannot be read."""
        if not os.path.lexists(self.folder / CARD_FILE):
            return b""
        faults: list[str] = []
        card = read_file(self.folder, CARD_FILE, faults)
        if card is None:
            raise AdapterFormatError(str(self.folder), faults)
        return card

    def file_faults(self) -> list[str]:
        """Return what is wrong with its files as far as that is seen without reading them whole."""
        return file_faults(self.folder)

    def basis(self, digest: str) -> Explicit:
        """Return the explicit basis of this digest. Raises as `load_basis`."""
        return load_basis(self.folder.parent, digest)

    def load(self, base: BaseIdentity | None = None) -> Adapter:
        """Read and checks it, see `lori.format.load_adapter`; its name is this entry's."""
        with self.held() as folder:
            adapter = load_adapter(folder, base)
        self.check_version(adapter.version)
        return replace(adapter, name=self.name)

    def check_version(self, found: str) -> None:
        """Raise `AdapterFormatError` where the folder's name has a version, and it is not the one that was `found` inside."""
        in_name = self.folder.name.partition("@")[2]
        if in_name and in_name != found:
            raise AdapterFormatError(str(self.folder), [f"its version is {found}, expected {in_name}"])


@dataclass(frozen=True, slots=True)
class Scan:
    """The folders of a store that hold an adapter."""

    entries: Sequence[Entry]
    """Every version of every adapter, in order of name. A link is among them: to read it fails."""
    misnamed: Sequence[str]
    """Folders whose name no adapter may have."""


def scan(root: Path, name: str | None = None) -> Scan:
    """Return which folders of the store `root` hold an adapter, or one that is called `name`. Opens none.

    Raises `AdapterError` where `root` cannot be read.
    """
    entries, misnamed = [], []
    try:
        with os.scandir(root) as items:
            asked = (item for item in items if name is None or item.name.partition("@")[0] == name)
            for item in filter(_is_adapter, asked):
                if _is_sound(item.name):
                    entries.append(Entry(item.name.partition("@")[0], root / item.name))
                else:
                    misnamed.append(item.name)
    except OSError as error:
        raise AdapterError(f"{root} is no folder of adapters: {error.strerror}") from error
    return Scan(sorted(entries, key=lambda entry: (entry.name, entry.folder.name)), sorted(misnamed))


def has_adapter(folder: str) -> bool:
    """Return whether a folder holds an adapter, be it damaged: without a config it has weights. Follows a link to the folder."""
    return any(_exists(os.path.join(folder, name)) for name in (CONFIG_FILE, WEIGHTS_FILE))  # a path costs more, of thousands


def is_version(folder: str) -> bool:
    """Return whether this is the name of a version's folder, `name@version`."""
    name, _, version = folder.partition("@")
    return bool(NAME.fullmatch(name) and VERSION.fullmatch(version))


def _is_sound(folder: str) -> bool:
    return bool(NAME.fullmatch(folder)) or is_version(folder)


def _is_adapter(item: "os.DirEntry[str]") -> bool:
    if item.name.startswith("."):
        return False
    if item.is_symlink():
        return _may_be_adapter(item)
    if not item.is_dir(follow_symlinks=False):
        return False
    if not _is_sound(item.name):
        return os.path.lexists(os.path.join(item.path, CONFIG_FILE))
    return is_version(item.name) or has_adapter(item.path)


def _may_be_adapter(link: "os.DirEntry[str]") -> bool:
    # To be told, not to be read: a link to a note is no damaged adapter, one that leads nowhere may be.
    try:
        found = os.stat(link.path)
    except OSError:
        return _is_sound(link.name)
    return stat.S_ISDIR(found.st_mode) and (is_version(link.name) or has_adapter(link.path))


def _exists(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a folder that may not be looked into: whether it is sound is seen when it is read
        return True
    return True


class Source(Protocol):
    """Has the files of the folders in a store."""

    def held(self, folder: str) -> AbstractContextManager[Path]:
        """Give the folder of that name with all its files, until the block ends."""

    def num_bytes(self, folder: str) -> int:
        """Return what its files hold."""

    def card(self, folder: str) -> bytes:
        """Return its card."""

    def file_faults(self, folder: str) -> list[str]:
        """Return what is wrong with its files, as far as the store says so."""

    def basis(self, digest: str) -> Explicit:
        """Return an explicit basis."""


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
