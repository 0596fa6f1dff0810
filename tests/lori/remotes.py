"""File systems of fsspec that a test can watch, block and break, and adapters at an address."""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from lori.adapter import Adapter
from lori.store.entry import Entry
from lori.store.remote import RemoteStore
from lori.store.store import AdapterStore
from tests.lori.adapters import make_adapter

LIMIT_S = 60
Open = Callable[..., RemoteStore]


def let(_: str, __: str) -> None:
    """Do nothing, so every operation proceeds."""


class WatchedFileSystem(MemoryFileSystem):
    """In-memory file system that records its operations."""

    protocol = "watched"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    asked: ClassVar[list[tuple[str, str]]] = []
    """The operations so far, each with its path."""
    before: ClassVar[Callable[[str, str], None]] = staticmethod(let)
    """Function called with the operation and the path before each operation. It may raise or block."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("watched://").removeprefix("flat://"))

    @classmethod
    def reset(cls) -> None:
        WatchedFileSystem.store.clear()
        WatchedFileSystem.pseudo_dirs[:] = [""]
        WatchedFileSystem.asked.clear()
        WatchedFileSystem.before = staticmethod(let)

    @classmethod
    def num(cls, what: str, end: str = "") -> int:
        """Return the number of operations `what` on paths that end with `end`."""
        return Counter(asked for asked, path in cls.asked if path.endswith(end))[what]

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        self._note("list", path)
        return list(super().ls(path, detail=detail, **kwargs))

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        self._note("read", path)
        return bytes(super().cat_file(path, **kwargs))

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        self._note("fetch", rpath)
        Path(lpath).write_bytes(super().cat_file(rpath, **kwargs))  # in the base's get_file all readers share one position

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        self._note("write", path)
        super().pipe_file(path, value, **kwargs)

    def rm_file(self, path: str) -> None:
        self._note("remove", path)
        super().rm_file(path)

    def _note(self, what: str, path: str) -> None:
        WatchedFileSystem.asked.append((what, path))
        WatchedFileSystem.before(what, path)


class FlatFileSystem(WatchedFileSystem):
    """File system like an object store: listings by prefix with md5s, and no folders, so no folder is ever missing."""

    protocol = "flat"

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        prefix: str = "",
    ) -> Any:
        assert detail
        assert maxdepth is None
        assert not withdirs
        self._note("list", path)
        start = f"{self._strip_protocol(path).rstrip('/')}/{prefix}"
        return {name: self.info(name) for name in sorted(self.store) if name.startswith(start)}

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        details = dict(super().info(path, **kwargs))
        if details["type"] == "file":
            details["ETag"] = f'"{hashlib.md5(self.store[details["name"]].getvalue(), usedforsecurity=False).hexdigest()}"'
        return details


class Gate:
    """Gate that blocks the operation `what` until `is_open` is set. The gate sets `has_come` when a caller waits."""

    def __init__(self, what: str, end: str = "") -> None:
        self.what, self.end = what, end
        self.has_come, self.is_open = threading.Event(), threading.Event()

    def __call__(self, what: str, path: str) -> None:
        if what == self.what and path.endswith(self.end):
            self.has_come.set()
            assert self.is_open.wait(LIMIT_S)


class Broken:
    """Broken network: the operation `what` fails."""

    def __init__(self, what: str, end: str = "") -> None:
        self.what, self.end = what, end

    def __call__(self, what: str, path: str) -> None:
        if what == self.what and path.endswith(self.end):
            raise ConnectionResetError("reset by watched://user:secret@host/path?key=secret")


def publish(store: AdapterStore, name: str, seed: int = 0) -> Entry:
    return store.add(make_adapter(name, seed=seed))


def same(actual: Adapter, expected: Adapter) -> bool:
    return actual.config.lori.content_digest == expected.config.lori.content_digest


def paths() -> Sequence[str]:
    return sorted(path.removeprefix("/store/") for path in WatchedFileSystem.store)


fsspec.register_implementation("watched", WatchedFileSystem, clobber=True)
fsspec.register_implementation("flat", FlatFileSystem, clobber=True)
