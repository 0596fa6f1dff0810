"""The aliases of a store: the file `.aliases/math` holds `math@1765747cce63`, the version that `math` means."""

import os
from contextlib import suppress
from pathlib import Path

from lori.errors import AdapterError, AliasError
from lori.names import AUTO, NAME, RESERVED, is_reference
from lori.store.files import FileStamp, file_stamp, no_link, read_stored, replace_file, sync_folder

ALIASES_FOLDER = ".aliases"
MAX_BYTES = 200
UNREADABLE = "the alias cannot be read"


class Aliases:
    """The aliases of the store at `root`, read from its files on each call. A rename moves an alias, so readers need no lock."""

    def __init__(self, root: Path) -> None:
        self.folder = root / ALIASES_FOLDER

    def all(self) -> dict[str, str]:
        """Return the target `name@version` of each alias. Raises `AdapterError` if one cannot be read."""
        return {name: target for name in self.names() if (target := self.get(name)) is not None}

    def readable(self) -> dict[str, str]:
        """Return the target of each alias that can be read."""
        targets = {}
        for name in self.names():
            with suppress(AdapterError):
                if (target := self.get(name)) is not None:
                    targets[name] = target
        return targets

    def names(self) -> list[str]:
        """Return the names of the aliases, sorted. Raises `AdapterError` if their folder is a link."""
        no_link(self.folder)
        return [name for name in sorted(os.listdir(self.folder)) if NAME.fullmatch(name)] if self.folder.is_dir() else []

    def get(self, name: str) -> str | None:
        """Return the target of the alias `name`, or None if there is no such alias. Raises `AliasError` if it cannot be read."""
        file = self.folder / name
        if name == AUTO and file.exists():
            raise AliasError(f"the alias {file}: {AUTO!r} {RESERVED}: remove the file", UNREADABLE)
        try:
            target = read_stored(self.folder, name, MAX_BYTES).decode().strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise AliasError(f"the alias {file} cannot be read: {reason}", UNREADABLE) from error
        if "@" not in target or not is_reference(target):
            raise AliasError(f"the alias {file} holds {target[:80]!r}, expected name@version", UNREADABLE)
        return target

    def stamp(self, name: str) -> FileStamp | None:
        """Return the stamp of the alias `name`, which changes each time the alias is set; None if there is no such alias."""
        return file_stamp(self.folder / name)

    def set(self, name: str, target: str) -> None:
        """Make the alias `name` mean `target`, a `name@version`."""
        no_link(self.folder).mkdir(exist_ok=True)
        replace_file(self.folder / name, f"{target}\n".encode())

    def remove(self, name: str) -> None:
        """Remove the alias `name` if it exists."""
        with suppress(FileNotFoundError):
            (no_link(self.folder) / name).unlink()
            sync_folder(self.folder)
