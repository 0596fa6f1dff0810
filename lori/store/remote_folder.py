"""A folder on any of fsspec's file systems: listed, read and written within a time limit. Knows no adapters.

An error of a file system becomes one of ours that names no address, for an address can hold a secret. The log has all of it,
without the secrets.
"""

import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lori.errors import AdapterError, AdapterFormatError, UnreachableError
from lori.store.files import REFUSED, read_stored, replace_file

logger = logging.getLogger(__name__)


URL = re.compile(r"[a-z0-9][a-z0-9+.-]*(::|://)", re.IGNORECASE)
USER_INFO = re.compile(r"(?<=://)([^/:[\s]+:(?!\d*(/|\s|$))\S*@|[^/\s]*@)")
"""Before the last @ of the host or, where no port follows a colon, before the last @ of all: a secret may have slashes."""
QUERY = re.compile(r"\?\S*")


def is_url(place: str) -> bool:
    """Return whether `place` is an address, such as s3://bucket/adapters, and no path of this machine."""
    return bool(URL.match(place))


def redacted(text: str) -> str:
    """Return `text` without what stands before the host and after the question mark of the addresses in it."""
    return QUERY.sub("?…", USER_INFO.sub("…@", text)) if "://" in text else text


Found = TypeVar("Found")


def within(seconds: float, act: Callable[[], Found]) -> Found:
    """Return what `act` returns, or raises what it raises. Raises `TimeoutError` where it takes longer.

    Then it is left to itself, in a thread that keeps no process alive.
    """
    done: Future[Found] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except BaseException as error:  # noqa: BLE001  # it is raised where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, name="remote", daemon=True).start()
    return done.result(seconds)


BATCH = 1024
"""Files that are read in one call, within the time limit."""
MAX_BYTES = 2**34
"""Of a file that is read from a folder of this machine."""
DEPTH = 2
NUM_LOOKS, NUM_WRITES = 3, 20
MARKS = ("ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated", "created", "ino", "md5")
"""Of what file systems say of a file, what changes with its content."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What a listing says of a file."""

    num_bytes: int
    mark: str | None
    """Another one where the content may be another; None where the file system says nothing of the kind."""
    md5: str = ""
    """Of the content (hex), where an object store says so; it may say something else there."""
    is_link: bool = False
    """Or a folder that is one. It is never followed."""


class RemoteFolder:
    """The folder at `url`. Paths are relative to it, with `/` between folder and file. Any threads may use it.

    No call takes longer than `timeout_s`. Raises `UnreachableError` where the file system fails, and `AdapterError` where it does
    not let anything be written.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        """Raise `AdapterError` where no file system is known for `url`, or it needs a package that is not there."""
        self.name = redacted(url)
        self._timeout_s = timeout_s
        try:
            self._fs, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise AdapterError(redacted(str(error))) from error
        except Exception as error:  # each file system has its own for an address that is none
            raise AdapterError(redacted(f"{type(error).__name__}: {error}")) from error
        self._root = root.rstrip("/")
        # A file system that lists by prefix lists whole trees at once, and knows no folders.
        self._is_flat = "prefix" in inspect.signature(getattr(self._fs, "_find", self._fs.find)).parameters

    def files(self) -> dict[str, RemoteFile]:
        """Return all files of the folder and of the folders in it, by path. Raises `AdapterError` where there is no folder."""
        found = self._do("listing", lambda: self._settled(lambda: self._below(self._root)))
        if [*found] == [""] and found[""].num_bytes:  # an empty one can stand for an empty folder, in an object store
            raise AdapterError("it is a file, expected a folder")
        return found

    def files_of(self, name: str) -> dict[str, RemoteFile]:
        """Return those in folders that are called `name`, or `name@` and more."""
        return self._do("listing", lambda: self._settled(lambda: self._named(name)))

    def files_in(self, folder: str) -> dict[str, RemoteFile]:
        """Return those in one folder in it; none where there is no such folder."""
        return self._do("listing", lambda: self._in(folder))

    def file(self, path: str) -> RemoteFile | None:
        """Return what is said of one file; None where it is not there."""
        try:
            return _said(self._do("listing", lambda: self._info(self._path(path))))
        except FileNotFoundError:
            return None

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the content of files, but of those that are not there."""
        found: dict[str, bytes] = {}
        for start in range(0, len(paths), BATCH):
            some = {self._path(path): path for path in paths[start : start + BATCH]}
            contents = self._do("reading", lambda some=some: self._contents([*some]))  # type: ignore[misc]
            found |= {path: contents[at] for at, path in some.items() if at in contents}
        return found

    def fetch(self, path: str, to: Path) -> None:
        """Copy a file to this machine. Raises `FileNotFoundError` where it is not there."""
        self._do("fetching", lambda: self._fetch(self._path(path), to))

    def write(self, path: str, content: bytes) -> None:
        """Write a file whole: a reader sees the old content or the new, where the file system keeps whole objects."""
        self._do("writing", lambda: self._write(self._path(path), content))

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files one after the other; what is not there is no fault. Folders that are left empty may go, too."""
        for path in paths:
            self._do("removing", lambda path=path: self._remove(self._path(path)))  # type: ignore[misc]

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if self._root else path

    def _do(self, what: str, act: Callable[[], Found]) -> Found:
        try:
            return within(self._timeout_s, act)
        except (FileNotFoundError, AdapterError):
            raise
        except (NotImplementedError, PermissionError) as error:
            self._log(what, error)
            raise AdapterError(f"{what} is not allowed in the store of the adapters: {type(error).__name__}") from error
        except TimeoutError as error:
            self._log(what, error)
            raise UnreachableError(f"{what} took longer than {self._timeout_s:g} s in the store of the adapters") from error
        except Exception as error:  # each file system has its own
            self._log(what, error)
            raise UnreachableError(f"{what} failed in the store of the adapters: {type(error).__name__}") from error

    def _log(self, what: str, error: Exception) -> None:
        logger.warning("%s: %s failed: %s: %s", self.name, what, type(error).__name__, redacted(str(error)))

    def _settled(self, look: Callable[[], Found]) -> Found:
        # While others write, a folder can go between two looks.
        for _ in range(NUM_LOOKS - 1):
            try:
                return look()
            except FileNotFoundError:
                continue
        try:
            return look()
        except FileNotFoundError as error:
            raise AdapterError("there is no such folder") from error

    def _below(self, folder: str, **prefix: str) -> dict[str, RemoteFile]:
        self._fs.invalidate_cache()  # what others wrote since is to be seen
        infos = self._fs.find(folder, detail=True, **prefix).values() if self._is_flat else self._walked(folder, DEPTH)
        return {self._relative(info["name"]): _said(info) for info in infos}

    def _walked(self, folder: str, depth: int) -> Iterator[Mapping[str, Any]]:
        # Not `find` nor `walk`, which take a folder that cannot be listed for empty.
        for info in self._fs.ls(folder, detail=True):
            if info["type"] != "directory":
                yield info
            elif depth > 1 and info["name"].rstrip("/") != folder:
                yield from self._walked(info["name"].rstrip("/"), depth - 1)

    def _info(self, path: str) -> Mapping[str, Any]:
        self._fs.invalidate_cache()
        found: Mapping[str, Any] = self._fs.info(path)
        if found["type"] != "file":
            raise FileNotFoundError(path)
        return found

    def _in(self, folder: str) -> dict[str, RemoteFile]:
        if isinstance(self._fs, LocalFileSystem) and Path(self._path(folder)).is_symlink():
            return {folder: RemoteFile(0, None, is_link=True)}
        try:
            return self._below(self._path(folder))
        except FileNotFoundError:
            return {}

    def _named(self, name: str) -> dict[str, RemoteFile]:
        if self._is_flat:
            return self._below(self._root, prefix=f"{name}@") | self._in(name)
        self._fs.invalidate_cache()
        folders = [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        own = [folder for folder in map(unquote, folders) if folder.partition("@")[0] == name]
        return {path: file for folder in own for path, file in self._in(folder).items()}

    def _relative(self, path: str) -> str:
        return unquote(path[len(self._root) :].lstrip("/"))  # over HTTP an @ may come quoted

    def _contents(self, paths: list[str]) -> dict[str, bytes]:
        contents: dict[str, bytes] = {}
        if isinstance(self._fs, LocalFileSystem):  # whose own way follows links
            for path in paths:
                with suppress(FileNotFoundError):
                    contents[path] = _read_here(Path(path))
            return contents
        for path, found in self._fs.cat(paths, on_error="return").items():
            if isinstance(found, Exception):
                if not isinstance(found, FileNotFoundError):
                    raise found
            else:
                contents[path] = found
        return contents

    def _fetch(self, path: str, to: Path) -> None:
        if isinstance(self._fs, LocalFileSystem):
            to.write_bytes(_read_here(Path(path)))
        else:
            self._fs.get_file(path, str(to))

    def _write(self, path: str, content: bytes) -> None:
        if isinstance(self._fs, LocalFileSystem):  # whose own way a reader could see half of
            _write_here(Path(path), content)
            return
        if not self._is_flat:
            self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        self._fs.pipe_file(path, content)

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)
        if isinstance(self._fs, LocalFileSystem):
            with suppress(OSError):  # it holds more, or another process was first
                Path(path).parent.rmdir()


def _read_here(file: Path) -> bytes:
    try:
        return read_stored(file.parent, file.name, MAX_BYTES)
    except OSError as error:
        if error.errno in REFUSED:  # a damaged adapter, and no file system that fails
            raise AdapterFormatError(file.parent.name, [f"{file.name} cannot be read: {error.strerror}"]) from error
        raise


def _write_here(file: Path, content: bytes) -> None:
    # Another process removes a folder that is empty, as one that was just made is, or is found here.
    for _ in range(NUM_WRITES - 1):
        with suppress(FileNotFoundError, FileExistsError):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, content)
            return
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, content)


def _said(info: Mapping[str, Any]) -> RemoteFile:
    marks = [f"{mark}={info[mark]}" for mark in MARKS if info.get(mark) is not None]
    md5 = str(info.get("ETag") or info.get("etag") or "").strip('"')
    is_link = bool(info.get("islink")) or info.get("type") == "link"
    return RemoteFile(int(info.get("size") or 0), f"{info.get('size')} {' '.join(marks)}" if marks else None, md5, is_link)
