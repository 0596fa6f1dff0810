"""A store at an address: its contents, the local cache, and concurrent use by several processes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError, UnknownAdapterError, UnreachableError
from lori.format import CARD_FILE, WEIGHTS_FILE, load_adapter, read_config, write_record
from lori.store.entry import Entry
from lori.store.remote import RemoteStore
from lori.store.remote_folder import RemoteFolder
from lori.store.store import AdapterStore
from tests.lori.adapters import RANK, SHAPES, make_adapter, make_config, make_modules, save, targeted
from tests.lori.remotes import LIMIT_S, Broken, Gate, WatchedFileSystem, let

Open = Callable[..., RemoteStore]


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


def close(store: RemoteStore) -> None:
    """Release a store's lock, as the end of its process does."""
    store._folder_lock.release()


def publish(store: AdapterStore, name: str, seed: int = 0) -> Entry:
    return store.add(make_adapter(name, seed=seed))


def put_plain(place: Path, name: str, seed: int) -> Adapter:
    """Write an adapter to the address as a plain folder."""
    adapter = save(place / name, make_config(), make_modules(seed=seed))
    for file in (place / name).iterdir():
        fsspec.filesystem("watched").pipe_file(f"/store/{name}/{file.name}", file.read_bytes())
    return adapter


def same(actual: Adapter, expected: Adapter) -> bool:
    return actual.config.lori.content_digest == expected.config.lori.content_digest


def paths() -> Sequence[str]:
    return sorted(path.removeprefix("/store/") for path in WatchedFileSystem.store)


def test_an_adapter_that_one_process_publishes_is_read_by_another(open_store: Open) -> None:
    ours, theirs = open_store(), open_store()
    expected = make_adapter("math")
    entry = ours.add(expected)
    assert paths() == [".aliases/math", f"{entry.folder.name}/{CONFIG_FILE}", f"{entry.folder.name}/{WEIGHTS_FILE}"]
    with pytest.raises(UnknownAdapterError):
        theirs.find("math")
    theirs.pull("math")
    pulled = theirs.find("math")
    assert pulled.reference == entry.reference
    assert pulled.folder != entry.folder
    assert same(pulled.load(), expected)
    assert same(open_store().current()["math"].load(), expected)


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


def test_the_config_is_written_after_the_weights_and_the_alias_last(open_store: Open) -> None:
    store = open_store()
    first = publish(store, "math").folder.name
    assert [path.removeprefix("/store/") for what, path in WatchedFileSystem.asked if what == "write"] == [
        f"{first}/{WEIGHTS_FILE}",
        f"{first}/{CONFIG_FILE}",
        ".aliases/math",
    ]
    WatchedFileSystem.asked.clear()
    store.remove("math")
    assert [path.removeprefix("/store/") for what, path in WatchedFileSystem.asked if what == "remove"] == [
        ".aliases/math",
        f"{first}/{CONFIG_FILE}",
        f"{first}/{WEIGHTS_FILE}",
    ]
    assert paths() == []


def test_a_name_without_an_alias_means_the_old_version_until_the_new_one_is_complete(open_store: Open) -> None:
    store = open_store()
    first = publish(store, "math").reference
    fsspec.filesystem("watched").rm_file("/store/.aliases/math")
    meant = []

    def look(what: str, _: str) -> None:
        WatchedFileSystem.before = staticmethod(let)
        if what == "write":
            meant.append(open_store().find("math").reference)
        WatchedFileSystem.before = look

    WatchedFileSystem.before = look
    second = publish(store, "math", seed=1).reference
    assert meant == [first] * 4
    assert open_store().find("math").reference == second


def test_concurrent_processes_publish_and_remove_the_same_adapter(open_store: Open) -> None:
    stores = [open_store() for _ in range(4)]
    adapter = make_adapter("math")
    with ThreadPoolExecutor(4) as pool:
        assert len({entry.reference for entry in pool.map(lambda store: store.add(adapter), stores)}) == 1
        assert len(paths()) == 3
        assert {entry.reference for entry in pool.map(lambda store: store.alias("prod", "math"), stores)} == {
            stores[0].find("math").reference
        }
        assert all(same(store.find("prod").load(), adapter) for store in stores)

        def remove(store: RemoteStore, reference: str) -> bool:
            try:
                store.remove(reference)
            except UnknownAdapterError:
                return False
            return True

        assert any(pool.map(lambda store: remove(store, "prod"), stores))
        assert any(pool.map(lambda store: remove(store, "math"), stores))
    assert paths() == []


def test_publishing_the_same_again_writes_only_the_alias(open_store: Open) -> None:
    adapter = make_adapter("math")
    open_store().add(adapter)
    WatchedFileSystem.asked.clear()
    other = open_store()
    other.add(adapter)
    assert [path for what, path in WatchedFileSystem.asked if what in ("write", "fetch")] == ["/store/.aliases/math"]


def test_publishing_again_with_new_measurements_replaces_the_record(open_store: Open, tmp_path: Path) -> None:
    save(tmp_path / "math", make_config(), make_modules())
    ours, theirs = open_store(), open_store()
    ours.publish(tmp_path / "math")
    theirs.pull("math")
    theirs.find("math").load()
    config = read_config(tmp_path / "math")
    section = config.lori.model_copy(update={"metrics": {"loss": 0.5}})
    write_record(tmp_path / "math", config.model_copy(update={"lori": section}), "measured")
    ours.publish(tmp_path / "math")
    theirs.pull("math")
    entry = theirs.find("math")
    assert read_config(entry.folder).lori.metrics == {"loss": 0.5}
    assert entry.card() == b"measured"
    assert WatchedFileSystem.num("fetch") == 1, "the same weights were fetched again"
    (tmp_path / "math" / CARD_FILE).write_text("measured again")
    theirs.publish(tmp_path / "math")
    ours.pull("math")
    assert ours.find("math").card() == b"measured again"


def test_an_adapter_made_in_another_way_keeps_its_record(open_store: Open, tmp_path: Path) -> None:
    for way, card in (("one", None), ("other", "# Made otherwise")):
        save(tmp_path / way / "math", make_config(training={"way": way}), make_modules())
        if card:
            (tmp_path / way / "math" / CARD_FILE).write_text(card)
        open_store().publish(tmp_path / way / "math")
    entry = open_store().find("math")
    assert read_config(entry.folder).lori.training == {"way": "one"}
    assert entry.card() == b""


def test_an_alias_moves_and_protects_its_version(open_store: Open) -> None:
    ours, theirs = open_store(), open_store()
    old, new = publish(ours, "math"), publish(ours, "math", seed=1)
    assert ours.alias("prod", old.reference).version == old.version
    theirs.pull("prod")
    assert theirs.find("prod").folder.name == old.reference
    for act in (lambda: theirs.remove(old.reference), lambda: theirs.removable("math")):
        with pytest.raises(AdapterError, match=f"'prod' means {old.reference}: move or remove the alias first"):
            act()
    theirs.alias("prod", "math")
    assert theirs.remove(old.reference) == [old.reference]
    ours.pull("prod")
    assert ours.find("prod").folder.name == new.reference
    theirs.alias("mine", "math")
    ours.remove("mine")
    ours.remove("prod")
    theirs.pull("prod", "mine", "math")
    assert theirs.aliases() == {"math": new.reference}
    theirs.alias("again", "math")
    ours.remove("again")
    assert theirs.remove("math") == [new.reference]


def test_a_plain_folder_is_not_lost_in_the_cache(open_store: Open) -> None:
    with pytest.raises(AdapterError, match=r"'math' cannot be saved in .* as its maker leaves it: publish it"):
        open_store().save(make_adapter("math"))
    assert paths() == []


def test_a_withdrawn_adapter_can_be_fetched_until_it_is_removed(open_store: Open) -> None:
    expected = make_adapter("math")
    ours, theirs = open_store(), open_store()
    ours.add(expected)
    theirs.pull("math")
    held = theirs.find("math")
    ours.withdraw("math")
    assert "math" not in open_store().current()
    theirs.pull("math")
    with pytest.raises(UnknownAdapterError):
        theirs.find("math")
    assert same(held.load(), expected), "an entry from before the withdrawal could not be loaded"
    theirs._weights.drop(held.folder.name)
    ours.remove("math")
    assert paths() == []
    with pytest.raises(AdapterFormatError, match="its files are in the store no more: it was deleted there"):
        held.load()


def test_an_adapter_that_another_process_withdrew_is_removed_all_the_same(open_store: Open) -> None:
    ours, theirs = open_store(), open_store()
    entry = publish(ours, "math")
    theirs.pull("math")
    ours.withdraw("math")
    with pytest.raises(UnknownAdapterError):
        theirs.withdraw("math", [entry.reference])
    assert theirs.remove("math") == [entry.reference]
    assert paths() == []
    assert ours.remove("math") == [entry.reference]


def test_an_adapter_that_is_published_again_is_not_removed(open_store: Open) -> None:
    adapter = make_adapter("math")
    ours, theirs = open_store(), open_store()
    ours.add(adapter)
    ours.withdraw("math")
    theirs.add(adapter)
    ours.remove("math")
    assert same(open_store().find("math").load(), adapter)
    theirs.withdraw("math")
    theirs.add(adapter)
    theirs.remove("math")
    assert paths() == [], "the adapter was withdrawn again and not removed"


def test_weights_that_are_removed_during_publishing_are_written_again(open_store: Open) -> None:
    adapter = make_adapter("math")
    ours, theirs = open_store(), open_store()
    ours.add(adapter)
    ours.withdraw("math")

    def remove(what: str, path: str) -> None:
        if what == "write" and path.endswith(CONFIG_FILE):
            WatchedFileSystem.before = staticmethod(let)
            ours.remove("math")

    WatchedFileSystem.before = remove
    theirs.add(adapter)
    assert same(open_store().find("math").load(), adapter)


def test_a_plain_folder_is_read_and_read_again(open_store: Open, tmp_path: Path) -> None:
    expected = put_plain(tmp_path, "mine", seed=1)
    store = open_store()
    assert same(store.find("mine").load(), expected)
    changed = put_plain(tmp_path, "mine", seed=2)
    assert same(store.find("mine").load(), expected), "the cached copy was not used"
    store.pull("mine")
    assert same(store.find("mine").load(), changed)
    assert store.find(f"mine@{changed.version}").folder.name == "mine"


def test_a_plain_folder_is_not_published_over(open_store: Open, tmp_path: Path) -> None:
    adapter = put_plain(tmp_path, "mine", seed=1)
    store, before = open_store(), paths()
    message = rf"'mine' is a folder of its own in .*:///store.*: rename it to mine@ and the version \({adapter.version}\) first"
    for act in (lambda: publish(store, "mine"), lambda: store.alias("prod", "mine")):
        with pytest.raises(AdapterError, match=message):
            act()
    assert paths() == before
    store.remove("mine")
    assert paths() == []


def test_an_adapter_is_no_store(open_store: Open, tmp_path: Path) -> None:
    """Regression: it was taken for an empty store, so its server had no adapters, without an error."""
    put_plain(tmp_path, "math", 1)
    WatchedFileSystem.store |= {path.replace("/math", ""): file for path, file in WatchedFileSystem.store.items()}
    with pytest.raises(AdapterError, match="it is an adapter, expected a folder of adapters"):
        open_store()


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


def test_a_basis_is_fetched_with_its_adapter(open_store: Open, tmp_path: Path) -> None:
    drawn = Seeded(9)
    basis = Explicit.from_tensors({name: drawn.draw(name, RANK, n) for name, (_, n) in targeted(SHAPES).items()})
    expected = save(tmp_path / "own", make_config(basis=drawn), make_modules(), basis)
    open_store().publish(tmp_path / "own")
    store = open_store()
    assert not [*store.root.glob(".bases/*")]
    assert store.find("own").basis(basis.content_digest).content_digest == basis.content_digest
    assert same(open_store().find("own").load(), expected)
    with pytest.raises(AdapterFormatError, match="its basis cannot be read"):
        store.find("own").basis("0" * 64)


@pytest.mark.parametrize(
    "path", ["../out/adapter_config.json", "math@12/../../x", ".aliases/../x", "math@12/.x", ".bases/x", "a/b/c", ".locks/math"]
)
def test_only_files_of_adapters_are_fetched(open_store: Open, path: str, tmp_path: Path) -> None:
    publish(open_store(), "math")
    WatchedFileSystem.store[f"/store/{path}"] = WatchedFileSystem.store["/store/.aliases/math"]
    before = {file for file in tmp_path.rglob("*") if "cache-1" not in file.parts}
    store = open_store()
    assert [*store.contents().current] == ["math"]
    assert not store.contents().faults
    assert not [*store.root.rglob("x")]
    assert {file for file in tmp_path.rglob("*") if "cache-1" not in file.parts} == before


@pytest.mark.parametrize("folder", ["Math", "my run", "math@xyz", "math@0123456789abcd"])
def test_a_folder_with_an_invalid_name_is_reported_and_not_left_out(open_store: Open, folder: str) -> None:
    publish(open_store(), "math")
    WatchedFileSystem.store[f"/store/{folder}/{CONFIG_FILE}"] = WatchedFileSystem.store["/store/.aliases/math"]
    contents = open_store().contents()
    assert [*contents.current] == ["math"]
    assert "an adapter's name must match" in contents.faults[folder]


def test_a_version_that_appears_during_the_listing_is_found(open_store: Open) -> None:
    writer = open_store()
    first = publish(writer, "math").reference

    def add(what: str, _: str) -> None:
        if what == "read":  # the listing is done, and the alias is not read yet
            WatchedFileSystem.before = staticmethod(let)
            publish(writer, "math", seed=1)

    WatchedFileSystem.before = add
    assert open_store().current()["math"].reference in {first, writer.find("math").reference}


def test_an_adapter_that_does_not_answer_fails_alone(open_store: Open) -> None:
    writer = open_store()
    for name in ("a", "b"):
        publish(writer, name)
    store = open_store()
    WatchedFileSystem.before = Broken("fetch", f"{store.find('a').folder.name}/{WEIGHTS_FILE}")
    with pytest.raises(UnreachableError, match="fetching failed in the store of the adapters: ConnectionResetError"):
        store.find("a").load()
    assert store.find("b").load().name == "b"
    WatchedFileSystem.before = Broken("list")
    for act in (lambda: store.pull("a"), lambda: publish(store, "c"), lambda: store.remove("b"), open_store):
        with pytest.raises(UnreachableError):
            act()
    assert store.find("b").load().name == "b", "the cached copy was not served"


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


@pytest.mark.slow
def test_concurrent_readers_see_the_old_or_the_new_version(open_store: Open) -> None:
    writer, stop = open_store(), threading.Event()
    publish(writer, "math")
    with ThreadPoolExecutor(2) as pool:

        def read() -> int:
            store, num = open_store(max_bytes=1), 0
            while not stop.is_set() or not num:
                store.pull("math")
                assert store.find("math").load().name == "math"
                num += 1
            return num

        reading = [pool.submit(read) for _ in range(2)]
        for seed in range(10):
            publish(writer, "math", seed=seed % 3)
        stop.set()
        assert all(one.result(LIMIT_S) for one in reading)
