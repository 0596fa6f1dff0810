"""A folder on any fsspec file system: listed, read and written within a time limit. Knows no adapters.

Errors of a file system become `LoriError`s that name no address, since an address can hold a secret. The log has the full error,
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
"""User info of a URL: up to the last @ in the host or, if no port follows a colon, up to the last @ of all. A secret may hold
slashes."""
QUERY = re.compile(r"\?\S*")


def is_url(place: str) -> bool:
    """Return whether `place` is an address, such as s3://bucket/adapters, and not a local path."""
    return bool(URL.match(place))


def redacted(text: str) -> str:
    """Return `text` without the user info and the query of the URLs in it."""
    return QUERY.sub("?…", USER_INFO.sub("…@", text)) if "://" in text else text


Result = TypeVar("Result")


def run_with_timeout(seconds: float, call: Callable[[], Result]) -> Result:
    """Return the result of `call`, or raise its exception. Raises `TimeoutError` if `call` takes longer than `seconds`.

    After a timeout, `call` goes on in a daemon thread.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  # raised again by `result`
            future.set_exception(error)

    threading.Thread(target=run, name="remote", daemon=True).start()
    return future.result(seconds)


BATCH = 1024
"""Number of files that are read in one call, within the time limit."""
MAX_BYTES = 2**34
"""Maximum size of a file that is read from a local folder."""
DEPTH = 2
NUM_ATTEMPTS, NUM_WRITES = 3, 20
MARKS = ("ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated", "created", "ino", "md5")
"""Keys of fsspec's file infos whose values change with the content."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a listing."""

    num_bytes: int
    mark: str | None
    """Change mark: differs if the content may have changed. None if the file system gives no such information."""
    md5: str = ""
    """ETag of an object store. For most objects this is the md5 of the content (hex), but it may be another value."""
    is_link: bool = False
    """Whether the file, or its folder, is a link. Links are never followed."""


class RemoteFolder:
    """The folder at `url`. Paths are relative to the folder, with `/` between folder and file. Thread-safe.

    No call takes longer than `timeout_s`. Raises `UnreachableError` if the file system fails, and `AdapterError` if it denies
    permission.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        """Open the file system. Raises `AdapterError` if none is known for `url`, or its package is not installed."""
        self.name = redacted(url)
        self._timeout_s = timeout_s
        try:
            self._fs, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise AdapterError(redacted(str(error))) from error
        except Exception as error:  # each file system has its own errors for malformed addresses
            raise AdapterError(redacted(f"{type(error).__name__}: {error}")) from error
        self._root = root.rstrip("/")
        # A file system that lists by prefix lists whole trees at once and has no folders.
        self._is_flat = "prefix" in inspect.signature(getattr(self._fs, "_find", self._fs.find)).parameters

    def files(self) -> dict[str, RemoteFile]:
        """Return all files of the folder and its subfolders, by path. Raises `AdapterError` if there is no such folder."""
        files = self._run("listing", lambda: self._retry(lambda: self._list(self._root)))
        if [*files] == [""] and files[""].num_bytes:  # in an object store an empty object can stand for an empty folder
            raise AdapterError("it is a file, expected a folder")
        return files

    def files_of(self, name: str) -> dict[str, RemoteFile]:
        """Return the files in the subfolders called `name` or `name@…`, by path."""
        return self._run("listing", lambda: self._retry(lambda: self._list_adapter(name)))

    def files_in(self, folder: str) -> dict[str, RemoteFile]:
        """Return the files in the subfolder `folder`, by path; empty if there is no such folder."""
        return self._run("listing", lambda: self._list_subfolder(folder))

    def file(self, path: str) -> RemoteFile | None:
        """Return the listing of one file; None if it does not exist."""
        try:
            return _remote_file(self._run("listing", lambda: self._info(self._path(path))))
        except FileNotFoundError:
            return None

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the contents of the files that exist, by path."""
        contents: dict[str, bytes] = {}
        for start in range(0, len(paths), BATCH):
            batch = {self._path(path): path for path in paths[start : start + BATCH]}
            by_full_path = self._run("reading", lambda batch=batch: self._contents([*batch]))  # type: ignore[misc]
            contents |= {path: by_full_path[full] for full, path in batch.items() if full in by_full_path}
        return contents

    def fetch(self, path: str, to: Path) -> None:
        """Copy a file to the local path `to`. Raises `FileNotFoundError` if it does not exist."""
        self._run("fetching", lambda: self._fetch(self._path(path), to))

    def write(self, path: str, content: bytes) -> None:
        """Write a file, atomically on a local file system or an object store."""
        self._run("writing", lambda: self._write(self._path(path), content))

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files one after the other. Missing files are ignored. Folders that become empty may be removed, too."""
        for path in paths:
            self._run("removing", lambda path=path: self._remove(self._path(path)))  # type: ignore[misc]

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if self._root else path

    def _run(self, action: str, call: Callable[[], Result]) -> Result:
        try:
            return run_with_timeout(self._timeout_s, call)
        except (FileNotFoundError, AdapterError):
            raise
        except (NotImplementedError, PermissionError) as error:
            self._log(action, error)
            raise AdapterError(f"{action} is not allowed in the store of the adapters: {type(error).__name__}") from error
        except TimeoutError as error:
            self._log(action, error)
            raise UnreachableError(f"{action} took longer than {self._timeout_s:g} s in the store of the adapters") from error
        except Exception as error:  # each file system has its own errors
            self._log(action, error)
            raise UnreachableError(f"{action} failed in the store of the adapters: {type(error).__name__}") from error

    def _log(self, action: str, error: Exception) -> None:
        logger.warning("%s: %s failed: %s: %s", self.name, action, type(error).__name__, redacted(str(error)))

    def _retry(self, call: Callable[[], Result]) -> Result:
        # While other processes write, a folder can disappear between its listing and that of its files.
        for _ in range(NUM_ATTEMPTS - 1):
            try:
                return call()
            except FileNotFoundError:
                continue
        try:
            return call()
        except FileNotFoundError as error:
            raise AdapterError("there is no such folder") from error

    def _list(self, folder: str, **prefix: str) -> dict[str, RemoteFile]:
        self._fs.invalidate_cache()  # so that the listing shows the latest writes of other processes
        infos = self._fs.find(folder, detail=True, **prefix).values() if self._is_flat else self._walk(folder, DEPTH)
        return {self._relative(info["name"]): _remote_file(info) for info in infos}

    def _walk(self, folder: str, depth: int) -> Iterator[Mapping[str, Any]]:
        # fsspec's `find` and `walk` treat a folder that cannot be listed as empty.
        for info in self._fs.ls(folder, detail=True):
            if info["type"] != "directory":
                yield info
            elif depth > 1 and info["name"].rstrip("/") != folder:
                yield from self._walk(info["name"].rstrip("/"), depth - 1)

    def _info(self, path: str) -> Mapping[str, Any]:
        self._fs.invalidate_cache()
        info: Mapping[str, Any] = self._fs.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return info

    def _list_subfolder(self, folder: str) -> dict[str, RemoteFile]:
        if isinstance(self._fs, LocalFileSystem) and Path(self._path(folder)).is_symlink():
            return {folder: RemoteFile(0, None, is_link=True)}
        try:
            return self._list(self._path(folder))
        except FileNotFoundError:
            return {}

    def _list_adapter(self, name: str) -> dict[str, RemoteFile]:
        if self._is_flat:
            return self._list(self._root, prefix=f"{name}@") | self._list_subfolder(name)
        self._fs.invalidate_cache()
        folders = [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        matching = [folder for folder in map(unquote, folders) if folder.partition("@")[0] == name]
        return {path: file for folder in matching for path, file in self._list_subfolder(folder).items()}

    def _relative(self, path: str) -> str:
        return unquote(path[len(self._root) :].lstrip("/"))  # over HTTP an @ may be percent-encoded

    def _contents(self, paths: list[str]) -> dict[str, bytes]:
        contents: dict[str, bytes] = {}
        if isinstance(self._fs, LocalFileSystem):  # whose own `cat` follows links
            for path in paths:
                with suppress(FileNotFoundError):
                    contents[path] = _read_local(Path(path))
            return contents
        for path, result in self._fs.cat(paths, on_error="return").items():
            if isinstance(result, Exception):
                if not isinstance(result, FileNotFoundError):
                    raise result
            else:
                contents[path] = result
        return contents

    def _fetch(self, path: str, to: Path) -> None:
        if isinstance(self._fs, LocalFileSystem):
            to.write_bytes(_read_local(Path(path)))
        else:
            self._fs.get_file(path, str(to))

    def _write(self, path: str, content: bytes) -> None:
        if isinstance(self._fs, LocalFileSystem):  # whose own `pipe_file` is not atomic
            _write_local(Path(path), content)
            return
        if not self._is_flat:
            self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        self._fs.pipe_file(path, content)

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)
        if isinstance(self._fs, LocalFileSystem):
            with suppress(OSError):  # not empty, or removed by another process
                Path(path).parent.rmdir()


def _read_local(file: Path) -> bytes:
    try:
        return read_stored(file.parent, file.name, MAX_BYTES)
    except OSError as error:
        if error.errno in REFUSED:  # the adapter is damaged; the file system works
            raise AdapterFormatError(file.parent.name, [f"{file.name} cannot be read: {error.strerror}"]) from error
        raise


def _write_local(file: Path, content: bytes) -> None:
    # Retries, since another process may remove the folder while it is empty.
    for _ in range(NUM_WRITES - 1):
        with suppress(FileNotFoundError, FileExistsError):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, content)
            return
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, content)


def _remote_file(info: Mapping[str, Any]) -> RemoteFile:
    marks = [f"{mark}={info[mark]}" for mark in MARKS if info.get(mark) is not None]
    md5 = str(info.get("ETag") or info.get("etag") or "").strip('"')
    is_link = bool(info.get("islink")) or info.get("type") == "link"
    return RemoteFile(int(info.get("size") or 0), f"{info.get('size')} {' '.join(marks)}" if marks else None, md5, is_link)
