"""Files of a store, opened without following links, whenever the links are created."""

import os
import socket
from pathlib import Path

import pytest

import lori.store.files
from lori.store.files import LINK, LINKED_FOLDER, open_stored, read_source, read_stored

MANY = 1 << 20
SECRET = b"the key file"


@pytest.fixture(params=[True, False], ids=["openat", "by path"])
def store(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a store with the folder `math` and a secret beside the store. Files are opened in both ways that the system has."""
    monkeypatch.setattr(lori.store.files, "HAS_OPENAT", request.param and lori.store.files.HAS_OPENAT)
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "store" / "math").mkdir(parents=True)
    return tmp_path / "store"


def refusal(folder: Path, name: str = "card") -> str:
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the caller checks the message
        read_stored(folder, name, MANY)
    return caught.value.strerror or ""


def test_a_regular_file_is_read(store: Path) -> None:
    (store / "math" / "card").write_bytes(b"x" * 9)
    assert read_stored(store / "math", "card", 9) == b"x" * 9
    with pytest.raises(OSError, match="it has 9 bytes, expected 8 at most"):
        read_stored(store / "math", "card", 8)
    with pytest.raises(FileNotFoundError):
        read_stored(store / "math", "nothing", MANY)
    with pytest.raises(FileNotFoundError):
        read_stored(store / "nothing", "card", MANY)


@pytest.mark.parametrize("target", ["../../secret", "card", "nowhere", "/dev/zero", "other"])
def test_a_linked_file_is_refused_wherever_it_leads(store: Path, target: str) -> None:
    (store / "math" / "other").write_bytes(b"of the same folder")
    (store / "math" / "card").symlink_to(target)
    assert refusal(store / "math") == LINK


def test_a_linked_folder_is_refused(store: Path) -> None:
    (store / "math" / "card").write_bytes(b"x")
    (store / "law").symlink_to("math")
    assert refusal(store / "law") == LINKED_FOLDER


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_an_irregular_file_is_refused_and_not_waited_for(store: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store / "math")  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        {"pipe": lambda: os.mkfifo("card"), "socket": lambda: listening.bind("card"), "folder": lambda: os.mkdir("card")}[kind]()
        assert refusal(store / "math") == "it is not a regular file"


def test_the_path_to_the_store_may_have_links(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / "math" / "card").write_bytes(b"x")
    (tmp_path / "mounted").symlink_to("store")
    assert read_stored(tmp_path / "mounted" / "math", "card", MANY) == b"x"
    monkeypatch.chdir(store / "math")
    assert read_stored(Path(), "card", MANY) == b"x"


@pytest.mark.parametrize("what", ["card", "math"])
def test_a_link_created_between_the_check_and_the_opening_is_not_followed(
    store: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, or its folder, is replaced by a link just before the file is opened."""
    folder, elsewhere, genuine = store / "math", store.parent / "elsewhere", os.open
    (folder / "card").write_bytes(b"x")
    elsewhere.mkdir()
    (elsewhere / "card").write_bytes(SECRET)

    def open_late(path: str | Path, flags: int, *, dir_fd: int | None = None) -> int:
        if os.fspath(path).endswith("card"):
            if what == "card":
                (folder / "card").unlink()
                (folder / "card").symlink_to("../../secret")
            else:
                folder.rename(store / "moved")
                folder.symlink_to(elsewhere)
        return genuine(path, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open_late)
    if what == "math" and lori.store.files.HAS_OPENAT:  # the folder is already open
        assert read_stored(folder, "card", MANY) == b"x"
    else:
        assert refusal(folder) in (LINK, LINKED_FOLDER)


def test_a_file_that_grows_is_not_read_for_ever(store: Path) -> None:
    (store / "math" / "card").write_bytes(b"x")
    with open_stored(store / "math", "card") as file:
        length = os.fstat(file.fileno())
        (store / "math" / "card").write_bytes(b"x" * 10)
        assert length.st_size == 1
    grown = os.stat_result(tuple(length))
    with open_stored(store / "math", "card") as file, pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fstat", lambda _: grown)
        with pytest.raises(OSError, match="it was written to while it was read"):
            lori.store.files.read_whole(file, MANY)


def test_a_snapshot_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0f").write_bytes(b"x")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "card").symlink_to("../../blobs/0f")
    assert read_source(snapshot, "card", MANY) == b"x"
    with pytest.raises(OSError, match=LINK):
        read_stored(snapshot, "card", MANY)


def test_a_volume_of_kubernetes_is_imported_through_its_links(tmp_path: Path) -> None:
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "card").write_bytes(b"x")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "card").symlink_to("..data/card")
    assert read_source(tmp_path, "card", MANY) == b"x"
    assert read_stored(tmp_path / "..2026", "card", MANY) == b"x"


@pytest.mark.parametrize("target", ["../secret", "../../secret", "card"])
def test_an_import_follows_no_link_out_of_its_folder(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    folder = tmp_path / "snapshots" / "main"
    folder.mkdir(parents=True)
    (tmp_path / "snapshots" / "secret").write_bytes(SECRET)
    (folder / "card").symlink_to(target)
    with pytest.raises(OSError):  # noqa: PT011
        read_source(folder, "card", MANY)
