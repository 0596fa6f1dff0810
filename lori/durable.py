"""Files and folders that a crash leaves whole: the old ones or the new ones."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lori.stored_file import check_regular, read_whole

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2(2), which Python does not wrap."""


def read_regular(path: Path, max_bytes: int | None = None) -> bytes:
    """Return the content of a file that the operator names; a link is followed, as mounted secrets are. See `lori.stored_file`.

    Raises `OSError` where it cannot be read, has more than `max_bytes`, or may never end.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    check_regular(path.stat(), path)  # even to open a device can have an effect
    with os.fdopen(os.open(path, flags), "rb") as file:
        check_regular(os.fstat(file.fileno()), path)
        return read_whole(file, max_bytes, path)


def write_file(path: Path, content: bytes) -> None:
    """Writes and syncs a file. It is not whole before this returns: for files of a folder that nobody reads yet."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Syncs a file that another one wrote."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes, mode: int = 0o644, owner: tuple[int, int] | None = None) -> None:
    """Writes a file aside, syncs it, and puts it in place: a reader sees the old content or the new.

    `owner`: its user and group, where they are not to be those of the process.
    """
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}@")
    os.close(handle)
    try:
        write_file(Path(scratch), content)
        if owner:
            os.chown(scratch, *owner)
        os.chmod(scratch, mode)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `folder` to write in, and puts it in place, over an old one, unless the block raises.

    A reader finds the old folder or the new one, after a crash too. (Where the file system cannot exchange two names in one step,
    there is a moment between two renames: a crash in it leaves the old folder beside, hidden, its name ending in `.old`.)
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        scratch.chmod(0o755)
        yield scratch
        sync_folder(scratch)
        _put_in_place(scratch, folder)
    finally:
        discard(scratch)  # what was written, or after an exchange what was there before


def _put_in_place(scratch: Path, folder: Path) -> None:
    if not (folder.exists() or folder.is_symlink()):
        scratch.rename(folder)
    elif not _exchange(scratch, folder):
        # A folder cannot be renamed over one that is not empty: the old one steps aside first.
        aside = scratch.with_name(scratch.name + ".old")
        folder.rename(aside)
        try:
            scratch.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        discard(aside)
    sync_folder(folder.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two names in one step; returns False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(error, os.strerror(error), str(b))


def discard(path: Path) -> None:
    """Removes a file, a link or a folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder: it is gone at once, under its name, and its files follow. Of a link the link alone goes."""
    if folder.is_symlink():
        folder.unlink()
        sync_folder(folder.parent)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}@"))
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
