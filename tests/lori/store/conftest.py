"""Fixtures for the tests of stores."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lori.store.remote import RemoteStore
from lori.store.remote_folder import RemoteFolder
from lori.store.store import AdapterStore
from tests.lori.remotes import LIMIT_S, Open, WatchedFileSystem, let


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """Return an empty store."""
    return AdapterStore(tmp_path / "store")


@pytest.fixture(params=["watched", "flat"])
def protocol(request: pytest.FixtureRequest) -> str:
    """Return the protocol of a file system, once with folders and once without."""
    WatchedFileSystem.reset()
    fsspec.filesystem("watched").makedirs("/store")
    protocol: str = request.param
    return protocol


@pytest.fixture
def open_store(protocol: str, tmp_path: Path) -> Iterator[Open]:
    """Yield a function that opens the store as another process, with a new cache or, by name, that of an earlier process."""
    opened: list[RemoteStore] = []

    def open_one(cache: str = "", max_bytes: int = 1 << 20) -> RemoteStore:
        folder = RemoteFolder(f"{protocol}:///store", LIMIT_S)
        opened.append(RemoteStore(folder, tmp_path / (cache or f"cache-{len(opened)}"), max_bytes))
        return opened[-1]

    yield open_one
    WatchedFileSystem.before = staticmethod(let)
