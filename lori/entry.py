"""One version of an adapter in a store, and which folders of a store are one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lori.adapter import Adapter
from lori.basis import Explicit
from lori.basis_file import load_basis
from lori.config_file import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError
from lori.format import CARD_FILE, load_adapter, read_config, read_file
from lori.identity import BaseIdentity
from lori.names import NAME, NUM_VERSION_DIGITS, VERSION


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
                return sum(item.stat().st_size for item in items if item.is_file())
        except FileNotFoundError:
            return 0

    @contextmanager
    def held(self) -> Iterator[Path]:
        """Yields the folder with all its files, which nothing takes away before the block ends but who deletes the adapter."""
        yield self.folder

    def card(self) -> bytes:
        """Returns its card; nothing where it has none, or it cannot be read."""
        return read_file(self.folder, CARD_FILE, []) or b""

    def basis(self, digest: str) -> Explicit:
        """Returns the explicit basis of this digest. Raises as `load_basis`."""
        return load_basis(self.folder.parent, digest)

    def load(self, base: BaseIdentity | None = None) -> Adapter:
        """Reads and checks it, see `lori.format.load_adapter`; its name is this entry's."""
        with self.held() as folder:
            adapter = load_adapter(folder, base)
        self.check_version(adapter.version)
        return replace(adapter, name=self.name)

    def check_version(self, found: str) -> None:
        """Raises `AdapterFormatError` where the folder's name has a version, and it is not the one that was `found` inside."""
        in_name = self.folder.name.partition("@")[2]
        if in_name and in_name != found:
            raise AdapterFormatError(str(self.folder), [f"its version is {found}, expected {in_name}"])


def scan(root: Path, name: str | None = None) -> Sequence[Entry]:
    """Returns every version of every adapter in the store `root`, or of the one called `name`, in order of name. Opens none.

    Raises `AdapterError` where `root` cannot be read, or holds an adapter that is a link or has no sound name.
    """
    try:
        with os.scandir(root) as items:
            asked = (item for item in items if name is None or item.name.partition("@")[0] == name)
            entries = [Entry(item.name.partition("@")[0], root / item.name) for item in asked if _is_adapter(item)]
    except OSError as error:
        raise AdapterError(f"{root} is no folder of adapters: {error.strerror}") from error
    return sorted(entries, key=lambda entry: (entry.name, entry.folder.name))


def _is_adapter(item: "os.DirEntry[str]") -> bool:
    if item.name.startswith(".") or not item.is_dir():
        return False
    name, _, version = item.name.partition("@")
    is_version = bool(NAME.fullmatch(name) and VERSION.fullmatch(version))
    if not is_version and not os.path.isfile(os.path.join(item.path, CONFIG_FILE)):
        return False
    if item.is_symlink():
        no_link(Path(item.path))
    if not is_version and not NAME.fullmatch(item.name):
        raise AdapterError(f"{item.path}: an adapter's name must match {NAME.pattern}")
    return True


def no_link(folder: Path) -> Path:
    """Returns `folder`. Raises `AdapterError` where it is a link."""
    if folder.is_symlink():
        raise AdapterError(f"{folder} is a link: a store follows none")
    return folder
