"""Crash safety of a store: a writer is killed before each file that it opens, renames or removes."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import pytest

from lori.store.store import AdapterStore
from tests.lori.adapters import BASE, make_config, make_modules, save

STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.chmod", "ctypes.dlsym"}
"""Python's audit events of a writer's file operations. The last one announces an exchange of two names."""


def publish_first(store: AdapterStore, made: Path) -> None:
    store.publish(made / "1", "law")


def publish_next(store: AdapterStore, made: Path) -> None:
    store.publish(made / "1", "math")


def replace_record(store: AdapterStore, made: Path) -> None:
    store.publish(made / "measured", "math")


def move_alias(store: AdapterStore, _: Path) -> None:
    store.alias("prod", "math")


def save_over(store: AdapterStore, _: Path) -> None:
    save(store.root / "plain", make_config(values="float32"), make_modules(seed=1))


def remove(store: AdapterStore, _: Path) -> None:
    store.remove("math")


CHANGES: dict[str, Callable[[AdapterStore, Path], None]] = {
    change.__name__: change for change in (publish_first, publish_next, replace_record, move_alias, save_over, remove)
}


def kill_at_each_step(start: Path, place: Path, made: Path) -> None:
    """Kill writers: for each change and n = 0, 1, … copy the store `start` to `place`/change/n, and make the change there in a
    process that is killed before its nth step."""
    for change in CHANGES:
        _kill_at_each_step(start, place / change, made, change)


def _kill_at_each_step(start: Path, place: Path, made: Path, change: str) -> None:
    for number in count():
        root = place / str(number)
        shutil.copytree(start, root)
        if (child := os.fork()) == 0:
            sys.addaudithook(partial(_die_at, iter(range(number))))
            CHANGES[change](AdapterStore(root), made)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            return


def _die_at(steps_before: Iterator[int], event: str, _: object) -> None:
    if event in STEPS and next(steps_before, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with adapters in `made`, a store `start`, and in `killed` the store that each killed writer left."""
    folder = tmp_path_factory.mktemp("stores")
    made, start = folder / "made", AdapterStore(folder / "start")
    for seed in range(3):
        save(made / str(seed), make_config(values="float32"), make_modules(seed=seed))
    save(made / "measured", make_config(values="float32", metrics={"loss": 0.5}), make_modules(seed=0))
    start.publish(made / "0", "math")
    save(start.root / "plain", make_config(values="float32"), make_modules(seed=0))
    writer = get_context("spawn").Process(target=kill_at_each_step, args=(start.root, folder / "killed", made))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_store_is_sound_whenever_its_writer_is_killed(stores: Path, change: str) -> None:
    """Every name means its old or its new version, and the next writer finds no lock and leaves no temporary files."""
    made = stores / "made"
    killed = sorted((stores / "killed" / change).iterdir(), key=lambda root: int(root.name))
    before, after = meanings(AdapterStore(stores / "start")), meanings(AdapterStore(killed[-1]))
    assert before != after, "the completed change had no effect"
    assert len(killed) > 5, "the writer was killed at too few steps"
    for root in killed:
        store = AdapterStore(root)
        current = meanings(store)
        assert all(current.get(name) in (before.get(name), after.get(name)) for name in before.keys() | after.keys()), root
        if change != "remove" or "math" in current:
            CHANGES[change](store, made)
        assert meanings(store) == after, root
        store.publish(made / "0", "math")  # cleans up after writers of its name
        store.alias("prod", "math")
        assert not [*root.rglob(".*@*")], "temporary files are left"


def meanings(store: AdapterStore) -> dict[str, object]:
    """Return the version and the record of each name. Every adapter is fully read and checked."""
    loaded = {name: entry.load(BASE) for name, entry in store.current().items()}
    return {name: (adapter.version, adapter.config.lori.metrics) for name, adapter in loaded.items()}
