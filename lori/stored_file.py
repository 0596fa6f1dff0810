"""A file of a store, opened without following a link.

The operator names the folder of a store, and the path to it may have links. What lies in it may come from anyone: a link in
there would show a file from elsewhere, and a pipe would block who reads it.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lori.errors import AdapterError

LINK = "it is a link, and a store follows none"
LINKED_FOLDER = "its folder is a link, and a store follows none"
REFUSED = (errno.ELOOP, errno.EINVAL, errno.EFBIG)
"""The `errno` of what is refused here, and not by the system."""
HAS_OPENAT = {os.open, os.stat} <= os.supports_dir_fd and hasattr(os, "O_NOFOLLOW") and hasattr(os, "O_DIRECTORY")
FILE_FLAGS = os.O_RDONLY
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
    FILE_FLAGS |= getattr(os, _name, 0)
FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)


def read_stored(folder: Path, name: str, max_bytes: int) -> bytes:
    """Return the content of the file `name` in `folder`, an entry of a store. Neither of the two is followed where it is a link.

    Raises `OSError` where it cannot be read; its `strerror` says so where it is a link or no regular file, or has more than
    `max_bytes`.
    """
    with open_stored(folder, name) as file:
        return read_whole(file, max_bytes)


@contextmanager
def open_stored(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open a file as `read_stored` does, for reading, until the block ends."""
    handle = _open_at(folder, name) if HAS_OPENAT else _open_by_path(folder, name)
    with os.fdopen(handle, "rb") as file:
        check_regular(os.fstat(handle))
        yield file


def read_source(folder: Path, name: str, max_bytes: int) -> bytes:
    """Return the content of a file in a folder outside the store, to be imported. Raises as `source_file` and `read_stored`."""
    file = source_file(folder, name)
    return read_stored(file.parent, file.name, max_bytes)


def source_file(folder: Path, name: str) -> Path:
    """Return the path without links of the file `name` in `folder`, which the operator or a download names.

    A link may lead to another file in the folder, as in a mounted volume; in a snapshot of the Hugging Face cache also to one of
    its blobs. Raises `OSError` for any other link.
    """
    root, file = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    blobs = root.parent.parent / "blobs"
    if not (file.is_relative_to(root) or (root.parent.name == "snapshots" and file.is_relative_to(blobs))):
        raise OSError(errno.ELOOP, "it is a link that leads out of its folder", str(folder / name))
    return file


def read_whole(file: BinaryIO, max_bytes: int | None, path: Path | None = None) -> bytes:
    """Return the content of a regular file that was just opened.

    Raises `OSError` where it has more than `max_bytes`, or grows meanwhile.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    if max_bytes is not None and num_bytes > max_bytes:
        raise OSError(errno.EFBIG, f"it has {num_bytes} bytes, expected {max_bytes} at most", path and str(path))
    content = file.read(num_bytes + 1)
    if len(content) > num_bytes:
        raise OSError(errno.EINVAL, "it was written to while it was read", path and str(path))
    return content


def no_link(folder: Path) -> Path:
    """Return `folder`. Raises `AdapterError` where it is a link."""
    if folder.is_symlink():
        raise AdapterError(f"{folder} is a link: a store follows none")
    return folder


def check_regular(found: os.stat_result, path: Path | None = None) -> None:
    """Raise `OSError` where this is not a regular file: a link, a folder, a pipe, a device."""
    if stat.S_ISLNK(found.st_mode) or getattr(found, "st_file_attributes", 0) & stat.FILE_ATTRIBUTE_REPARSE_POINT:
        raise OSError(errno.ELOOP, LINK, path and str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", path and str(path))


def _open_at(folder: Path, name: str) -> int:
    place = _open_folder(folder)
    try:
        check_regular(os.stat(name, dir_fd=place, follow_symlinks=False))  # even to open a device can have an effect
        return _open(name, place)
    finally:
        os.close(place)


def _open(path: str, dir_fd: int | None = None) -> int:
    try:
        return os.open(path, FILE_FLAGS, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link that was put there since it was looked at
            raise OSError(errno.ELOOP, LINK, path) from None
        raise


def _open_folder(folder: Path) -> int:
    folder = folder if folder.name else folder.absolute()  # "."
    parent = os.open(folder.parent, FOLDER_FLAGS)
    try:
        return os.open(folder.name or ".", FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=parent)
    except OSError:
        if stat.S_ISLNK(os.stat(folder.name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, LINKED_FOLDER, str(folder)) from None
        raise
    finally:
        os.close(parent)


def _open_by_path(folder: Path, name: str) -> int:
    # Where a folder cannot be held open: what was opened must be what lay there before, in a folder that still is none.
    _check_folder(folder)
    before = os.lstat(folder / name)
    check_regular(before)
    handle = _open(str(folder / name))
    try:
        _check_folder(folder)
        if not os.path.samestat(os.fstat(handle), before):
            raise OSError(errno.ELOOP, LINK, str(folder / name))
    except OSError:
        os.close(handle)
        raise
    return handle


def _check_folder(folder: Path) -> None:
    found = os.lstat(folder)
    if stat.S_ISLNK(found.st_mode) or getattr(found, "st_file_attributes", 0) & stat.FILE_ATTRIBUTE_REPARSE_POINT:
        raise OSError(errno.ELOOP, LINKED_FOLDER, str(folder))
