"""Files and folders that a crash leaves whole: the old ones or the new ones."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Writes and syncs a file. It is not whole before this returns: for files of a folder that nobody reads yet."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file aside, syncs it, and puts it in place: a reader sees the old content or the new."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        write_file(Path(scratch), content)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `folder` to write in, and puts it in place, over an old one, unless the block raises.

    A reader sees the old folder or the new one, or none for the moment between two renames. A crash in that moment leaves the old
    one beside, hidden, its name ending in `.old`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        scratch.chmod(0o755)
        yield scratch
        sync_folder(scratch)
        _put_in_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(scratch: Path, folder: Path) -> None:
    if folder.exists():
        # A folder cannot be renamed over one that is not empty: the old one steps aside first.
        aside = scratch.with_name(scratch.name + ".old")
        folder.rename(aside)
        try:
            scratch.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink()
    else:
        scratch.rename(folder)
    sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder: it is gone at once, under its name, and its files follow."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        folder.rename(aside)  # over an empty folder
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside)


def sync_folder(folder: Path) -> None:
    """Syncs the names that `folder` holds."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
