"""Files of a store: opened without following links, written atomically, and stamped.

The operator names a store's folder, and the path to the folder may have links. The files in it may come from anyone: a link there
would expose a file from elsewhere, and a pipe would block its reader. After a crash the old file or folder is there, or the new
one. The stamp of a file changes whenever the file is written, even if size and modification time stay the same.
"""

import ctypes
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lori.errors import AdapterError

FileStamp = tuple[int, int, int, int, int]


def file_stamp(path: Path) -> FileStamp | None:
    """Return the stamp of the file at `path`, following links; None if the file cannot be examined.

    The stamp includes the ctime, which the kernel sets: unlike the modification time, no program can set it back.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


LINK = "it is a link, and a store follows none"
LINKED_FOLDER = "its folder is a link, and a store follows none"
REFUSED = (errno.ELOOP, errno.EINVAL, errno.EFBIG)
"""`errno` values of the refusals in this module, as opposed to those of the system."""
HAS_OPENAT = {os.open, os.stat} <= os.supports_dir_fd and hasattr(os, "O_NOFOLLOW") and hasattr(os, "O_DIRECTORY")
FILE_FLAGS = os.O_RDONLY
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
    FILE_FLAGS |= getattr(os, _name, 0)
FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)


def read_stored(folder: Path, name: str, max_bytes: int) -> bytes:
    """Return the content of the file `name` in `folder`, an entry of a store. Follows neither if it is a link.

    Raises `OSError` if the file cannot be read, including links, other files than regular ones, and files of more than
    `max_bytes`; `strerror` gives the reason.
    """
    with open_stored(folder, name) as file:
        return read_whole(file, max_bytes)


@contextmanager
def open_stored(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open a file for reading until the block ends, with the checks of `read_stored`."""
    handle = _open_at(folder, name) if HAS_OPENAT else _open_by_path(folder, name)
    with os.fdopen(handle, "rb") as file:
        check_regular(os.fstat(handle))
        yield file


def read_source(folder: Path, name: str, max_bytes: int) -> bytes:
    """Return the content of a file in a folder outside the store, for an import. Raises as `source_file` and `read_stored`."""
    file = source_file(folder, name)
    return read_stored(file.parent, file.name, max_bytes)


def source_file(folder: Path, name: str) -> Path:
    """Return the real path of the file `name` in `folder`, which comes from the operator or a download.

    A link may lead to another file in the folder, as in a mounted volume. In a snapshot of the Hugging Face cache a link may also
    lead to one of its blobs. Raises `OSError` for any other link.
    """
    root, file = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    blobs = root.parent.parent / "blobs"
    if not (file.is_relative_to(root) or (root.parent.name == "snapshots" and file.is_relative_to(blobs))):
        raise OSError(errno.ELOOP, "it is a link that leads out of its folder", str(folder / name))
    return file


def read_whole(file: BinaryIO, max_bytes: int | None, path: Path | None = None) -> bytes:
    """Return the content of a regular file that was just opened.

    Raises `OSError` if the file has more than `max_bytes` or grows during the read.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    if max_bytes is not None and num_bytes > max_bytes:
        raise OSError(errno.EFBIG, f"it has {num_bytes} bytes, expected {max_bytes} at most", path and str(path))
    content = file.read(num_bytes + 1)
    if len(content) > num_bytes:
        raise OSError(errno.EINVAL, "it was written to while it was read", path and str(path))
    return content


def no_link(folder: Path) -> Path:
    """Return `folder`. Raises `AdapterError` if it is a link."""
    if folder.is_symlink():
        raise AdapterError(f"{folder} is a link: a store follows none")
    return folder


def check_regular(status: os.stat_result, path: Path | None = None) -> None:
    """Raise `OSError` unless `status` is that of a regular file. Refuses links, folders, pipes and devices."""
    if stat.S_ISLNK(status.st_mode) or getattr(status, "st_file_attributes", 0) & stat.FILE_ATTRIBUTE_REPARSE_POINT:
        raise OSError(errno.ELOOP, LINK, path and str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", path and str(path))


def _open_at(folder: Path, name: str) -> int:
    handle = _open_folder(folder)
    try:
        check_regular(os.stat(name, dir_fd=handle, follow_symlinks=False))  # before the open, which has side effects on a device
        return _open(name, handle)
    finally:
        os.close(handle)


def _open(path: str, dir_fd: int | None = None) -> int:
    try:
        return os.open(path, FILE_FLAGS, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ELOOP:  # the file was replaced by a link after the check
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
    # For systems without openat: the opened file must be the one that was checked, and the folder must still be no link.
    _check_folder(folder)
    checked = os.lstat(folder / name)
    check_regular(checked)
    handle = _open(str(folder / name))
    try:
        _check_folder(folder)
        if not os.path.samestat(os.fstat(handle), checked):
            raise OSError(errno.ELOOP, LINK, str(folder / name))
    except OSError:
        os.close(handle)
        raise
    return handle


def _check_folder(folder: Path) -> None:
    status = os.lstat(folder)
    if stat.S_ISLNK(status.st_mode) or getattr(status, "st_file_attributes", 0) & stat.FILE_ATTRIBUTE_REPARSE_POINT:
        raise OSError(errno.ELOOP, LINKED_FOLDER, str(folder))


AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Constants of Linux's renameat2(2), which Python does not wrap."""


def read_regular(path: Path, max_bytes: int | None = None) -> bytes:
    """Return the content of a file that the operator names. Follows links, since mounted secrets are links.

    Raises `OSError` if the file cannot be read, has more than `max_bytes`, or is no regular file and so may never end.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    check_regular(path.stat(), path)  # before the open, which has side effects on a device
    with os.fdopen(os.open(path, flags), "rb") as file:
        check_regular(os.fstat(file.fileno()), path)
        return read_whole(file, max_bytes, path)


def write_file(path: Path, content: bytes) -> None:
    """Write and sync a file. Not atomic: only for files in a folder that nobody reads yet."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Sync a file that other code wrote."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes, mode: int = 0o644, owner: tuple[int, int] | None = None) -> None:
    """Replace a file atomically and sync it: a reader sees the old content or the new.

    `owner` is the user and group of the file, by default those of the process.
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


def check_writable(path: Path) -> None:
    """Raise `OSError` if `replace_file` could not write `path`: it is a folder, or its folder is missing or not writable."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        error.filename = str(path.parent)  # and not the scratch file
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden scratch folder, and move it to `folder` after the block, in place of an old one, unless the block raises.

    A reader finds the old folder or the new one, also after a crash. If the file system cannot exchange two names atomically, a
    crash between two renames leaves the old folder hidden beside `folder`, with a name that ends in `.old`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        scratch.chmod(0o755)
        yield scratch
        sync_folder(scratch)
        _put_in_place(scratch, folder)
    finally:
        discard(scratch)  # the unfinished folder or, after an exchange, the old one


def _put_in_place(scratch: Path, folder: Path) -> None:
    if not (folder.exists() or folder.is_symlink()):
        scratch.rename(folder)
    elif not _exchange(scratch, folder):
        # A folder cannot be renamed over a folder that is not empty, so the old one is renamed first.
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
    """Exchange two names atomically. Returns False if the system or the file system cannot."""
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
    """Remove a file, a link or a folder. Ignores errors in a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder: first its name, atomically, then its files. Of a link, only the link is removed."""
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
    """Sync the directory entries of `folder`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
