"""Changes of a store at an address by several processes: publishing, aliases, withdrawals and removals."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError, UnknownAdapterError
from lori.format import CARD_FILE, WEIGHTS_FILE, read_config, write_record
from lori.prompt_statistics import STATISTICS_FILE
from lori.store.remote import RemoteStore
from tests.lori.adapters import make_adapter, make_config, make_modules, save, write_statistics
from tests.lori.remotes import LIMIT_S, Open, WatchedFileSystem, let, paths, publish, same


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


def test_statistics_of_prompts_are_published_replaced_and_removed(open_store: Open, tmp_path: Path) -> None:
    save(tmp_path / "math", make_config(), make_modules())
    ours, theirs = open_store(), open_store()
    ours.publish(tmp_path / "math")
    theirs.pull("math")
    entry = theirs.find("math")
    assert entry.prompt_statistics() is None
    for background in ("d" * 64, "e" * 64):
        write_statistics(tmp_path / "math", background=background)
        ours.publish(tmp_path / "math")
        theirs.pull("math")
        statistics = entry.prompt_statistics(read_config(tmp_path / "math").lori.content_digest)
        assert statistics is not None
        assert statistics.background_digest == background
        assert open_store().find("math").prompt_statistics() is not None, "a process that starts now has none"
    assert entry.num_bytes == sum(file.stat().st_size for file in (tmp_path / "math").iterdir())
    theirs.find("math").load()
    fsspec.filesystem("watched").rm_file(f"/store/{entry.folder.name}/{STATISTICS_FILE}")
    theirs.pull("math")
    assert entry.prompt_statistics() is None
    theirs.publish(tmp_path / "math")
    ours.pull("math")
    assert ours.find("math").prompt_statistics() is not None
    ours.remove("math")
    assert paths() == []


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
