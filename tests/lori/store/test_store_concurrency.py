"""Concurrent readers and writers of a store, of which some are killed: each reader sees a sound version."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import pytest
from filelock import FileLock

from lori.errors import AdapterError
from lori.store.aliases import ALIASES_FOLDER
from lori.store.files import remove_folder
from lori.store.store import AdapterStore
from tests.lori.adapters import BASE, make, publish


@pytest.mark.slow
def test_readers_see_one_version_or_the_other_while_writers_move_it(store: AdapterStore, tmp_path: Path) -> None:
    versions = {publish(store, tmp_path / str(seed), "math", seed) for seed in range(3)}
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(store.find("math").load(BASE).version)

    def write(seed: int) -> None:
        for _ in range(10):
            store.publish(tmp_path / str(seed) / "made" / "math")

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for writer in [pool.submit(write, seed) for seed in range(3)]:
            writer.result()
        stop.set()
        for reader in readers:
            reader.result()
    assert seen <= versions
    assert {entry.version for entry in store.list()} == versions


def _publish_for_ever(root: Path, made: Path, num_rounds: Synchronized) -> None:
    store = AdapterStore(root)
    while True:
        num_rounds.value += 1
        for folder in sorted(made.iterdir()):
            entry = store.publish(folder, "math")
            store.alias("prod", "math")
            store.remove("prod")
            for other in store.list():
                if other.version != entry.version:
                    store.remove(other.reference)


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_a_sound_store(store: AdapterStore, tmp_path: Path) -> None:
    made = {make(tmp_path / "made" / str(seed), seed).version for seed in range(3)}
    store.publish(tmp_path / "made" / "0", "math")
    context = get_context("spawn")
    for i in range(4):
        num_rounds = context.Value("i", 0)
        writer = context.Process(target=_publish_for_ever, args=(store.root, tmp_path / "made", num_rounds))
        writer.start()
        while num_rounds.value < 2 and writer.is_alive():  # a process that is still starting has written nothing
            time.sleep(0.01)
        writer.join(0.05 + 0.13 * i)
        assert num_rounds.value >= 2, "the writer ended before it was killed"
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL, "the writer ended before it was killed"
        assert store.find("math").load(BASE).version in made
    store.publish(tmp_path / "made" / "1", "math")  # would wait if a lock were still held
    assert not list(store.root.glob(".math@*"))


def test_removing_a_name_is_atomic_for_readers(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Regression: the alias was removed first. Readers, also after a crash, found a name that could mean any of its versions.
    for seed in range(3):
        current = publish(store, tmp_path, "math", seed)
    seen = []

    def look(folder: Path) -> None:
        seen.append(store.find("math").version)
        remove_folder(folder)

    monkeypatch.setattr("lori.store.store.remove_folder", look)
    store.remove("math")
    assert seen == [current] * 3


@pytest.mark.slow
def test_a_version_that_is_about_to_be_aliased_is_not_removed(store: AdapterStore, tmp_path: Path) -> None:
    old = publish(store, tmp_path, "math", 1)
    publish(store, tmp_path, "math", 2)
    outcomes: list[str] = []

    def act(do: Callable[[], object], name: str) -> None:
        try:
            do()
            outcomes.append(name)
        except AdapterError:
            outcomes.append(f"no {name}")

    (store.root / ".locks").mkdir(exist_ok=True)
    with FileLock(store.root / ".locks" / "prod"):  # alias() has to wait after it has resolved its target
        threads = [threading.Thread(target=act, args=(lambda: store.alias("prod", f"math@{old}"), "alias"))]
        threads[0].start()
        time.sleep(0.3)
        threads.append(threading.Thread(target=act, args=(lambda: store.remove(f"math@{old}"), "remove")))
        threads[1].start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    assert sorted(outcomes) in (["alias", "no remove"], ["no alias", "remove"])
    assert store.current()


def test_files_of_a_killed_writer_are_removed(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    (store.root / ".math@left").write_text("a file")
    (store.root / ".math@folder").mkdir()
    (store.root / ALIASES_FOLDER / ".math@left").write_text("x")
    publish(store, tmp_path, "math", 2)
    assert not list(store.root.rglob(".math@*"))
