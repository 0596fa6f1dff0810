"""A folder at an address: listing, reading and writing, on file systems with and without folders."""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from lori.errors import AdapterError, UnreachableError
from lori.store.remote_folder import RemoteFolder
from tests.lori.remotes import Broken, Gate, WatchedFileSystem

CONFIG, ALIAS = "math@12/adapter_config.json", ".aliases/math"


@pytest.fixture(params=["watched", "flat", "memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RemoteFolder]:
    """Yield an existing folder."""
    WatchedFileSystem.reset()
    url = f"{request.param}://{tmp_path}/store"
    if request.param != "flat":
        fsspec.filesystem(request.param).makedirs(f"{tmp_path}/store")
    yield RemoteFolder(url, 60)
    if request.param == "memory":
        fsspec.filesystem(request.param).rm(f"{tmp_path}/store", recursive=True)


@pytest.fixture
def watched() -> RemoteFolder:
    WatchedFileSystem.reset()
    fsspec.filesystem("watched").makedirs("/store")
    return RemoteFolder("watched:///store", 60)


def test_written_files_are_listed_and_read(folder: RemoteFolder, tmp_path: Path) -> None:
    assert folder.files() == {}
    folder.write(CONFIG, b"{}")
    folder.write(ALIAS, b"math@12\n")
    folder.write("mathematics/adapter_config.json", b"[]")
    assert {path: file.num_bytes for path, file in folder.files().items()} == {
        CONFIG: 2,
        ALIAS: 8,
        "mathematics/adapter_config.json": 2,
    }
    assert [*folder.files_of("math")] == [*folder.files_in("math@12")] == [CONFIG]
    assert folder.files_of("nobody") == folder.files_in("nobody") == {}
    assert folder.read([CONFIG, "nobody/x", ALIAS]) == {CONFIG: b"{}", ALIAS: b"math@12\n"}
    folder.fetch(CONFIG, tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == b"{}"
    with pytest.raises(FileNotFoundError):
        folder.fetch("nobody/x", tmp_path / "there")


def test_changed_content_has_another_mark(folder: RemoteFolder) -> None:
    folder.write(CONFIG, b"{}")
    before = folder.file(CONFIG)
    assert folder.file(CONFIG) == before
    assert before
    assert before.mark
    folder.write(CONFIG, b"[]")
    assert folder.file(CONFIG) != before


def test_a_removed_file_is_gone_and_can_be_removed_again(folder: RemoteFolder) -> None:
    folder.write(CONFIG, b"{}")
    folder.write(ALIAS, b"math@12\n")
    for _ in range(2):
        folder.remove([CONFIG])
        assert [*folder.files()] == [ALIAS]
        assert folder.file(CONFIG) is None


@pytest.mark.parametrize("protocol", ["watched", "memory", "file"])
def test_a_missing_folder_is_reported(protocol: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no such folder"):
        RemoteFolder(f"{protocol}://{tmp_path}/nowhere", 60).files()


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_file_is_no_folder(protocol: str, tmp_path: Path) -> None:
    fsspec.filesystem(protocol).pipe_file(f"{tmp_path}/store.zip", b"x")
    with pytest.raises(AdapterError, match="it is a file, expected a folder"):
        RemoteFolder(f"{protocol}://{tmp_path}/store.zip", 60).files()


@pytest.mark.slow
def test_a_folder_that_is_removed_during_a_write_is_made_again(tmp_path: Path) -> None:
    """Regression: if another process removed the empty folder, the writer failed with `No such file or directory`."""
    num, path = 400, f"{tmp_path}/store"

    def put_and_remove() -> None:
        folder = RemoteFolder(f"file://{path}", 60)
        for _ in range(num):
            folder.write(ALIAS, b"math@12\n")
            folder.remove([ALIAS])

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(put_and_remove) for _ in range(3)]:
            done.result()


def test_an_unknown_protocol_and_a_missing_package_are_reported() -> None:
    with pytest.raises(AdapterError, match="Protocol not known: nope"):
        RemoteFolder("nope://x", 60)
    fsspec.register_implementation("absent", "no_such_package.X", errtxt="Install no_such_package to go there", clobber=True)
    with pytest.raises(AdapterError, match="Install no_such_package to go there"):
        RemoteFolder("absent://x", 60)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(watched: RemoteFolder) -> None:
    watched.write(CONFIG, b"{}")
    WatchedFileSystem.before = Broken("list", "math@12")
    with pytest.raises(UnreachableError, match=r"listing failed .*: ConnectionResetError$"):
        watched.files()


def test_the_log_has_the_reason_without_secrets(watched: RemoteFolder, caplog: pytest.LogCaptureFixture) -> None:
    WatchedFileSystem.before = Broken("read")
    with caplog.at_level(logging.WARNING), pytest.raises(UnreachableError, match=r"^reading failed in the store of the adapters"):
        watched.read([CONFIG])
    assert "watched://…@host/path?…" in caplog.text
    assert "secret" not in caplog.text


def test_a_file_system_that_does_not_answer_is_abandoned() -> None:
    WatchedFileSystem.reset()
    fsspec.filesystem("watched").makedirs("/store")
    WatchedFileSystem.before = gate = Gate("read")
    with pytest.raises(UnreachableError, match=r"reading took longer than 0.05 s"):
        RemoteFolder("watched:///store", 0.05).read([CONFIG])
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "remote"), "it would keep the process alive"
    gate.is_open.set()


def test_a_refused_write_is_reported(watched: RemoteFolder) -> None:
    def refuse(_: str, path: str) -> None:
        raise PermissionError(path)

    WatchedFileSystem.before = refuse
    with pytest.raises(AdapterError, match="writing is not allowed") as caught:
        watched.write(CONFIG, b"{}")
    assert not isinstance(caught.value, UnreachableError)
