"""The aliases of a store: `.aliases/math` holds `math@1765747cce63`, the version that `math` means."""

import os
from contextlib import suppress
from pathlib import Path

from lori.errors import AdapterError, AliasError
from lori.names import NAME, VERSION
from lori.store.files import FileStamp, file_stamp, no_link, read_stored, replace_file, sync_folder

ALIASES_FOLDER = ".aliases"
MAX_BYTES = 200
UNREADABLE = "the alias cannot be read"


class Aliases:
    """What the aliases of the store at `root` mean, as its files say now. One moves by a rename: readers need no lock."""

    def __init__(self, root: Path) -> None:
        self.folder = root / ALIASES_FOLDER

    def all(self) -> dict[str, str]:
        """Return what each alias means, `name@version`. Raises `AdapterError` where one cannot be read."""
        return {name: meant for name in self.names() if (meant := self.get(name)) is not None}

    def readable(self) -> dict[str, str]:
        """Return `all` but for those that cannot be read."""
        found = {}
        for name in self.names():
            with suppress(AdapterError):
                if (meant := self.get(name)) is not None:
                    found[name] = meant
        return found

    def names(self) -> list[str]:
        """Return the names of the aliases, in order. Raises `AdapterError` where their folder is a link."""
        no_link(self.folder)
        return [name for name in sorted(os.listdir(self.folder)) if NAME.fullmatch(name)] if self.folder.is_dir() else []

    def get(self, name: str) -> str | None:
        """Return what the alias `name` means, or None where there is none. Raises `AliasError` where it cannot be read."""
        file = self.folder / name
        try:
            meant = read_stored(self.folder, name, MAX_BYTES).decode().strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise AliasError(f"the alias {file} cannot be read: {reason}", UNREADABLE) from error
        target, _, version = meant.partition("@")
        if not (NAME.fullmatch(target) and VERSION.fullmatch(version)):
            raise AliasError(f"the alias {file} holds {meant[:80]!r}, expected name@version", UNREADABLE)
        return meant

    def stamp(self, name: str) -> FileStamp | None:
        """Return what is another each time that the alias `name` is set; None where there is none."""
        return file_stamp(self.folder / name)

    def set(self, name: str, meant: str) -> None:
        """Make the alias `name` mean `meant`, `name@version`."""
        no_link(self.folder).mkdir(exist_ok=True)
        replace_file(self.folder / name, f"{meant}\n".encode())

    def remove(self, name: str) -> None:
        """Remove the alias `name`, where there is one."""
        with suppress(FileNotFoundError):
            (no_link(self.folder) / name).unlink()
            sync_folder(self.folder)
