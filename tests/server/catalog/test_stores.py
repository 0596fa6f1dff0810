"""The server's own store, a folder or an address, and the error if it cannot be read."""

import logging
from pathlib import Path

import fsspec
import pytest

from lori.errors import AdapterError
from lori.store.remote import RemoteStore
from lori.store.store import AdapterStore
from server.catalog.stores import open_stores
from server.settings import Settings
from tests.lori.remotes import Broken, Gate, WatchedFileSystem, let


@pytest.fixture(autouse=True)
def _watched() -> None:
    """Make an empty store at watched:///store."""
    WatchedFileSystem.reset()
    fsspec.filesystem("watched").makedirs("/store")


def opened(place: object, tmp_path: Path, **settings: object) -> AdapterStore | None:
    return open_stores(Settings(adapters=place, adapter_cache=tmp_path / "cache", demo_adapters=False, **settings))[0]


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_folder_is_opened_as_a_local_store(as_path: type, tmp_path: Path) -> None:
    store = opened(as_path(tmp_path), tmp_path)
    assert type(store) is AdapterStore
    assert store.root == tmp_path
    assert not (tmp_path / "cache").exists()
    assert opened(None, tmp_path) is None


def test_each_address_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    places = ["watched:///store", f"file://{tmp_path}/other"]
    stores = [opened(place, tmp_path) for place in places]
    assert all(type(store) is RemoteStore and store.root.is_relative_to(tmp_path / "cache") for store in stores)
    assert stores[0]
    assert stores[1]
    assert stores[0].root.parent != stores[1].root.parent
    monkeypatch.setenv("LORI_CACHE", str(tmp_path / "all"))
    store = open_stores(Settings(adapters=places[0], delete_grace_s=7))[0]
    assert store
    assert store.root.is_relative_to(tmp_path / "all" / "adapters")
    assert store.grace_s == 7


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nope://user:secret@host/adapters?key=secret", "--adapters nope://…@host/adapters?…: Protocol not known: nope"),
        ("file:///no/such/place", "--adapters file:///no/such/place: there is no such folder"),
        (
            "watched:///store",
            "--adapters watched:///store: listing failed in the store of the adapters: ConnectionResetError: reset",
        ),
        ("absent://x", "--adapters absent://x: Install no_such_package to go there"),
    ],
)
def test_a_store_that_cannot_be_read_is_reported_in_one_line(
    place: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fsspec.register_implementation("absent", "no_such_package.X", errtxt="Install no_such_package to go there", clobber=True)
    WatchedFileSystem.before = Broken("list")
    with caplog.at_level(logging.DEBUG), pytest.raises(AdapterError) as caught:
        opened(place, tmp_path)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value) + caplog.text


def test_a_store_that_does_not_answer_is_reported_in_time(tmp_path: Path) -> None:
    WatchedFileSystem.before = gate = Gate("list")
    with pytest.raises(AdapterError, match=r"^--adapters watched:///store: listing took longer than 0.05 s"):
        opened("watched:///store", tmp_path, adapter_timeout_s=0.05)
    gate.is_open.set()
    WatchedFileSystem.before = staticmethod(let)
