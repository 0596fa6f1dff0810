"""Local cache of a store at an address: what is fetched, kept and read again."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError, UnreachableError
from lori.format import WEIGHTS_FILE, load_adapter
from lori.prompt_statistics import MAX_STATISTICS_BYTES, STATISTICS_FILE
from lori.store.remote import RemoteStore
from lori.store.remote_folder import RemoteFolder
from tests.lori.adapters import make_adapter, make_config, make_modules, save, write_statistics
from tests.lori.remotes import LIMIT_S, Gate, Open, WatchedFileSystem, paths, publish, same


def close(store: RemoteStore) -> None:
    """Release a store's lock, as the end of its process does."""
    store._folder_lock.release()


@pytest.mark.slow
def test_only_configs_are_fetched_at_start_and_weights_once(open_store: Open) -> None:
    writer = open_store()
    for number in range(20):
        publish(writer, f"a{number}", seed=number)
    WatchedFileSystem.asked.clear()
    store = open_store()
    assert len(store.current()) == len(store.list()) == 20
    assert WatchedFileSystem.num("read", CONFIG_FILE) == 20
    assert WatchedFileSystem.num("fetch") == WatchedFileSystem.num("read", WEIGHTS_FILE) == 0
    entry = store.find("a7")
    assert not (entry.folder / WEIGHTS_FILE).exists()
    assert entry.num_bytes == publish(writer, "a7", seed=7).num_bytes > 500
    for _ in range(3):
        assert entry.load().name == "a7"
    assert WatchedFileSystem.num("fetch") == 1


@pytest.mark.slow
def test_a_process_reuses_the_cache_of_an_earlier_one(open_store: Open) -> None:
    writer = open_store()
    for number in range(20):
        publish(writer, f"a{number}", seed=number)
    first = open_store("own")
    first.find("a3").load()
    close(first)
    publish(writer, "a4", seed=104)
    writer.remove("a5")
    WatchedFileSystem.asked.clear()
    second = open_store("own")
    assert WatchedFileSystem.num("read", CONFIG_FILE) == 1
    assert WatchedFileSystem.num("read", ".aliases/a4") == WatchedFileSystem.num("read") - 1
    second.find("a3").load()
    assert WatchedFileSystem.num("fetch") == 0
    assert "a5" not in second.current()
    assert not [*second.root.glob("a5@*"), *second.root.glob(".aliases/a5")]


def test_statistics_that_were_removed_while_no_process_ran_are_not_read(open_store: Open, tmp_path: Path) -> None:
    save(tmp_path / "math", make_config(), make_modules())
    write_statistics(tmp_path / "math")
    first = open_store("kept")
    entry = first.publish(tmp_path / "math")
    close(first)
    fsspec.filesystem("watched").rm_file(f"/store/{entry.folder.name}/{STATISTICS_FILE}")
    second = open_store("kept")
    assert second.root == first.root
    assert second.find("math").prompt_statistics() is None


def test_statistics_that_are_too_long_are_not_fetched(open_store: Open, tmp_path: Path) -> None:
    entry = open_store().publish(save(tmp_path / "math", make_config(), make_modules()) and tmp_path / "math")
    path = f"/store/{entry.folder.name}/{STATISTICS_FILE}"
    fsspec.filesystem("watched").pipe_file(path, bytes(MAX_STATISTICS_BYTES + 1))
    found = open_store().find("math")
    assert found.file_faults() == [f"{STATISTICS_FILE} has 1048577 bytes, expected 1048576 at most"]
    assert not (found.folder / STATISTICS_FILE).exists()


def test_an_alias_of_its_own_name_is_recognized_by_its_listed_md5_without_a_read(open_store: Open, protocol: str) -> None:
    writer = open_store()
    for number in range(5):
        publish(writer, f"a{number}", seed=number)
    publish(writer, "a0", seed=9)
    writer.alias("prod", "a1")
    WatchedFileSystem.asked.clear()
    store = open_store()
    expected = {name: entry.folder.name for name, entry in writer.current().items()}
    assert {name: entry.folder.name for name, entry in store.current().items()} == expected
    read = [path for what, path in WatchedFileSystem.asked if what == "read" and "/.aliases/" in path]
    assert read == ["/store/.aliases/prod"] if protocol == "flat" else len(read) == 6


def test_two_processes_never_share_a_cache(open_store: Open) -> None:
    first, second = open_store("own"), open_store("own")
    assert first.root != second.root
    close(first)
    assert open_store("own").root == first.root


def test_weights_make_room_for_others_unless_they_are_in_use(open_store: Open) -> None:
    writer = open_store()
    entries = [publish(writer, f"a{number}", seed=number) for number in range(4)]
    size = max((entry.folder / WEIGHTS_FILE).stat().st_size for entry in entries)
    store = open_store(max_bytes=2 * size)

    def here() -> set[str]:
        return {file.parent.name[:2] for file in store.root.glob(f"*/{WEIGHTS_FILE}")}

    for name in ("a0", "a1", "a0", "a2"):
        store.find(name).load()
    assert here() == {"a0", "a2"}
    with store.find("a0").acquire() as folder:
        for name in ("a1", "a2", "a3"):
            store.find(name).load()
        assert same(load_adapter(folder), make_adapter("a0"))
        with store.find("a1").acquire(), store.find("a2").acquire():
            assert here() == {"a0", "a1", "a2"}, "weights in use were removed to make room"
    assert len(here()) == 2
    small = open_store(max_bytes=1)
    assert small.find("a0").load().name == "a0"
    assert not [*small.root.glob(f"*/{WEIGHTS_FILE}")]


def test_an_interrupted_download_is_not_taken_for_whole(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_adapter("math")
    open_store().add(expected)
    store = open_store()

    def cut(_: object, __: str, lpath: str) -> None:
        Path(lpath).write_bytes(b"half of it")
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr(WatchedFileSystem, "get_file", cut)
        with pytest.raises(UnreachableError, match="fetching failed"):
            store.find("math").load()
    assert not [*store.root.rglob(f"*{WEIGHTS_FILE}*")]
    assert same(store.find("math").load(), expected)


def test_damaged_weights_are_refused_and_fetched_again(open_store: Open) -> None:
    expected = make_adapter("math")
    folder = open_store().add(expected).folder.name
    store, file = open_store(), f"/store/{folder}/{WEIGHTS_FILE}"
    sound = fsspec.filesystem("watched").cat_file(file)
    fsspec.filesystem("watched").pipe_file(file, sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(AdapterFormatError, match="content digest"):
        store.find("math").load()
    fsspec.filesystem("watched").pipe_file(file, sound)
    assert same(store.find("math").load(), expected)


def test_many_requests_at_once_fetch_once(open_store: Open) -> None:
    publish(open_store(), "math")
    store = open_store()
    WatchedFileSystem.before = gate = Gate("fetch")
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(store.find("math").load) for _ in range(4)]
        assert gate.has_come.wait(LIMIT_S)
        gate.is_open.set()
        assert [one.result(LIMIT_S).name for one in asked] == ["math"] * 4
    assert WatchedFileSystem.num("fetch") == 1


def test_weights_that_are_removed_right_after_the_download_are_reported_as_gone(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread removes them. Regression: `FileNotFoundError` was raised, with a path."""
    publish(open_store(), "math")
    theirs = open_store()
    use = theirs._weights.use

    def remove_before(folder: str) -> None:
        theirs.remove("math")
        use(folder)

    monkeypatch.setattr(theirs._weights, "use", remove_before)
    with pytest.raises(AdapterFormatError, match="deleted there"):
        theirs.find("math").load()


def test_a_cache_that_cannot_be_written_is_reported(protocol: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"its cache .*/file/x cannot be written: Not a directory"):
        RemoteStore(RemoteFolder(f"{protocol}:///store", LIMIT_S), tmp_path / "file" / "x", 1)


def test_a_full_cache_is_reported(open_store: Open, tmp_path: Path) -> None:
    """Regression: if the cache's folder could be created, but no copy in it, the start failed with `OSError`."""
    publish(open_store(), "math")
    version = next(path.partition("/")[0] for path in paths() if path.startswith("math@"))
    (tmp_path / "full" / "0").mkdir(parents=True)
    (tmp_path / "full" / "0" / version).write_bytes(b"")  # in place of a full disk, since root may write anywhere else
    with pytest.raises(AdapterError, match=r"its cache \S+full cannot be written: "):
        open_store("full")
