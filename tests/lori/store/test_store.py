"""A folder of adapters: versions, aliases, and concurrent readers and writers."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError, UnknownAdapterError
from lori.format import WEIGHTS_FILE, load_adapter, write_record
from lori.store.aliases import ALIASES_FOLDER
from lori.store.bases import basis_file, load_basis, save_basis
from lori.store.files import remove_folder
from lori.store.store import AdapterStore
from tests.lori.adapters import BASE, RANK, SHAPES, make_config, make_modules, save, targeted


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """Return an empty store."""
    return AdapterStore(tmp_path / "store")


def make(folder: Path, seed: int = 0, **config: Any) -> Adapter:
    return save(folder, make_config(**config), make_modules(seed=seed))


def publish(store: AdapterStore, tmp_path: Path, name: str, seed: int = 0) -> str:
    """Publish a random adapter and return its version."""
    version = make(tmp_path / "made" / name, seed).version
    assert store.publish(tmp_path / "made" / name).version == version
    return version


# --- publish, find, list


def test_a_published_adapter_is_found_by_name_and_by_version(store: AdapterStore, tmp_path: Path) -> None:
    old, new = publish(store, tmp_path, "math", 1), publish(store, tmp_path, "math", 2)
    assert old != new
    assert store.find("math").version == new
    assert store.find(f"math@{old}").version == store.find(f"math@{old[:6]}").version == old
    assert {entry.reference for entry in store.list()} == {f"math@{old}", f"math@{new}"}
    assert store.aliases() == {"math": f"math@{new}"}
    assert store.find("math").load(BASE).version == new


def test_a_published_adapter_is_the_same_bytes_and_its_card(store: AdapterStore, tmp_path: Path) -> None:
    make(tmp_path / "math")
    (tmp_path / "math" / "README.md").write_text("# math\n")
    (tmp_path / "math" / "notes.txt").write_text("not part of it")
    folder = store.publish(tmp_path / "math").folder
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
        name: (tmp_path / "math" / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE, "README.md")
    }


def test_publishing_again_updates_the_record(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    folder = tmp_path / "made" / "math"
    config = load_adapter(folder).config
    measured = config.model_copy(update={"lori": config.lori.model_copy(update={"metrics": {"loss": 0.5}})})
    write_record(folder, measured, "# measured\n")
    store.publish(folder)
    published = store.find("math")
    assert published.load().config.lori.metrics == {"loss": 0.5}
    assert (published.folder / "README.md").read_text() == "# measured\n"


def test_publishing_again_changes_nothing(store: AdapterStore, tmp_path: Path) -> None:
    version = publish(store, tmp_path, "math")
    before = os.stat(store.find("math").folder / WEIGHTS_FILE)
    assert publish(store, tmp_path, "math") == version
    assert os.stat(store.find("math").folder / WEIGHTS_FILE).st_ino == before.st_ino


def test_publishing_repairs_a_damaged_copy(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    (store.find("math").folder / WEIGHTS_FILE).write_bytes(b"")
    publish(store, tmp_path, "math")
    assert store.find("math").load(BASE)


def test_an_adapter_can_be_published_under_another_name(store: AdapterStore, tmp_path: Path) -> None:
    make(tmp_path / "made")
    assert store.publish(tmp_path / "made", "law").load().name == "law"


def test_an_unsound_adapter_is_not_published(store: AdapterStore, tmp_path: Path) -> None:
    make(tmp_path / "math")
    (tmp_path / "math" / WEIGHTS_FILE).write_bytes(b"x")
    with pytest.raises(AdapterFormatError):
        store.publish(tmp_path / "math")
    assert not store.root.exists()


def test_a_version_that_differs_from_its_folder_name_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    version = publish(store, tmp_path, "math")
    store.find("math").folder.rename(store.root / "math@0123456789ab")
    with pytest.raises(AdapterFormatError, match=f"its version is {version}, expected 0123456789ab"):
        store.find("math@0123").load()


def test_an_ambiguous_version_lists_its_candidates(store: AdapterStore) -> None:
    for version in ("aa0000000000", "aa1111111111"):
        (store.root / f"math@{version}").mkdir(parents=True)
    with pytest.raises(AdapterError, match="math@aa could be math@aa0000000000 or math@aa1111111111"):
        store.find("math@aa")
    with pytest.raises(AdapterError, match="'math' could be any of math@aa0000000000, math@aa1111111111"):
        store.find("math")
    assert store.find("math@aa0").version == "aa0000000000"


@pytest.mark.parametrize("reference", ["law", "law@aa", "math@ffffffffffff"])
def test_a_missing_reference_is_unknown(store: AdapterStore, tmp_path: Path, reference: str) -> None:
    with pytest.raises(UnknownAdapterError):
        store.find(reference)
    publish(store, tmp_path, "math")
    with pytest.raises(UnknownAdapterError):
        store.find(reference)


@pytest.mark.parametrize(
    "reference",
    ["../made", "/etc", "made/math", ".", "..", "", "Math", ".aliases", "math@", "math@../x", "math@XYZ", "math\0", "a" * 65],
)
@pytest.mark.parametrize("act", [AdapterStore.find, AdapterStore.remove])
def test_no_reference_leads_out_of_the_store(
    store: AdapterStore, tmp_path: Path, act: Callable[[AdapterStore, str], Any], reference: str
) -> None:
    publish(store, tmp_path, "math")
    with pytest.raises(AdapterError):
        act(store, reference)
    assert (tmp_path / "made" / "math" / CONFIG_FILE).exists()


@pytest.mark.parametrize("name", ["Math", "../x", "a/b", "", ".hidden"])
def test_no_unsound_name_is_published_or_aliased(store: AdapterStore, tmp_path: Path, name: str) -> None:
    publish(store, tmp_path, "math")
    with pytest.raises(AdapterError, match="is no adapter's name"):
        store.publish(tmp_path / "made" / "math", name)
    with pytest.raises(AdapterError, match="is no adapter's name"):
        store.alias(name, "math")


def test_a_link_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    make(tmp_path / "elsewhere")
    store.root.mkdir()
    (store.root / "math").symlink_to(tmp_path / "elsewhere")
    for act in (store.current, lambda: store.find("math")):
        with pytest.raises(AdapterError, match="is a link: a store follows none"):
            act()
    [entry] = store.list()
    with pytest.raises(AdapterFormatError, match="its folder is a link, and a store follows none"):
        entry.load()


def test_a_version_that_is_a_link_is_refused_by_its_alias_too(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    folder = store.find("math").folder
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="is a link: a store follows none"):
        store.find("math")


def test_an_alias_file_cannot_lead_out_of_the_store(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    (store.root / ALIASES_FOLDER / "law").write_text("../made/math@aa")
    with pytest.raises(AdapterError, match="expected name@version"):
        store.find("law")


# --- aliases


def test_an_alias_moves(store: AdapterStore, tmp_path: Path) -> None:
    old, new = publish(store, tmp_path, "math", 1), publish(store, tmp_path, "math", 2)
    store.alias("prod", f"math@{old}")
    assert store.find("prod").version == old
    assert store.find("prod").load().name == "prod"
    store.alias("prod", "math")
    store.alias("latest", "prod")
    assert store.find("prod").version == store.find("latest").version == new
    store.alias("math", f"math@{old}")  # roll back
    assert store.find("math").version == old
    assert set(store.current()) == {"math", "prod", "latest"}


def test_an_adapters_name_cannot_be_an_alias_of_another(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math", 1)
    publish(store, tmp_path, "law", 2)
    with pytest.raises(AdapterError, match="'law' is an adapter"):
        store.alias("law", "math")


# --- plain folders


def test_a_plain_folder_is_the_adapter_of_its_name(store: AdapterStore) -> None:
    saved = make(store.root / "math")
    assert store.find("math").version == saved.version
    assert store.find(f"math@{saved.version}").folder == store.root / "math"
    assert [entry.reference for entry in store.list()] == [f"math@{saved.version}"]


def test_publishing_keeps_a_plain_folder_as_a_version(store: AdapterStore, tmp_path: Path) -> None:
    old = make(store.root / "math").version
    new = publish(store, tmp_path, "math", 2)
    assert store.find("math").version == new
    assert store.find(f"math@{old}").load(BASE).version == old
    assert not (store.root / "math").exists()


def test_a_plain_folder_can_be_published_in_place(store: AdapterStore) -> None:
    version = make(store.root / "math").version
    assert store.publish(store.root / "math").folder == store.root / f"math@{version}"
    assert store.find("math").load(BASE).version == version
    assert [entry.folder.name for entry in store.list()] == [f"math@{version}"]


def test_an_alias_of_a_plain_folder_keeps_it_as_a_version(store: AdapterStore) -> None:
    version = make(store.root / "math").version
    store.alias("prod", "math")
    assert store.find("prod").version == store.find("math").version == version


def test_a_folder_with_the_name_of_an_alias_is_reported(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math", 1)
    make(store.root / "math", 2)
    for act in (store.current, lambda: store.find("math")):
        with pytest.raises(AdapterError, match="'math' is an alias and a folder of its own"):
            act()
    assert store.publish(store.root / "math").version == store.find("math").version


# --- remove


def test_a_removed_version_is_gone_and_the_others_stay(store: AdapterStore, tmp_path: Path) -> None:
    old, new = publish(store, tmp_path, "math", 1), publish(store, tmp_path, "math", 2)
    store.remove(f"math@{old[:8]}")
    assert [entry.version for entry in store.list()] == [new]
    with pytest.raises(UnknownAdapterError):
        store.find(f"math@{old}")


def test_a_removed_name_is_gone_with_all_its_versions(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math", 1)
    publish(store, tmp_path, "math", 2)
    publish(store, tmp_path, "law", 3)
    store.remove("math")
    assert list(store.current()) == ["law"]
    assert sorted(path.name for path in store.root.iterdir()) == [".aliases", ".locks", store.find("law").folder.name]


@pytest.mark.parametrize("again", [1, 2, 3])
def test_an_adapter_published_after_its_name_was_withdrawn_stays(store: AdapterStore, tmp_path: Path, again: int) -> None:
    """Regression: if another server published while requests here still used the old versions, all versions were removed."""
    versions = [publish(store, tmp_path, "math", seed) for seed in (1, 2)]
    store.withdraw("math", [f"math@{version}" for version in versions])
    new = publish(AdapterStore(store.root), tmp_path, "math", again)
    store.remove("math")
    assert [entry.version for entry in store.list()] == [store.find("math").version] == [new]
    store.remove("math")
    assert store.list() == []


def test_a_withdrawn_name_is_removed_whole(store: AdapterStore, tmp_path: Path) -> None:
    versions = [publish(store, tmp_path, "math", seed) for seed in (1, 2)]
    store.withdraw("math", [f"math@{version}" for version in versions[:1]])
    store.remove("math")
    assert store.list() == []
    assert list(store.current()) == []


def test_a_preview_of_a_removal_lists_the_versions_and_removes_nothing(store: AdapterStore, tmp_path: Path) -> None:
    versions = [publish(store, tmp_path, "math", 1), publish(store, tmp_path, "math", 2)]
    store.alias("prod", "math")
    assert [entry.version for entry in store.removable(f"math@{versions[0][:8]}")] == versions[:1]
    assert store.removable("prod") == []
    with pytest.raises(AdapterError, match="'prod' means math@"):
        store.removable("math")
    store.remove("prod")
    assert (
        {entry.version for entry in store.removable("math")} == {entry.version for entry in store.versions("math")} == {*versions}
    )
    with pytest.raises(UnknownAdapterError):
        store.removable("law")
    assert store.versions("law") == AdapterStore(tmp_path / "nowhere").versions("math") == []
    with pytest.raises(AdapterError, match="is no folder of adapters"):
        AdapterStore(tmp_path / "nowhere").removable("math")


def test_a_dangling_alias_can_be_removed(store: AdapterStore, tmp_path: Path) -> None:
    # Regression: the removal of a dangling alias was refused, so the store could not be repaired.
    publish(store, tmp_path, "math")
    store.alias("prod", "math")
    shutil.rmtree(store.find("math").folder)
    with pytest.raises(AdapterError, match="has none"):
        store.find("prod")
    store.remove("prod")
    store.remove("math")
    assert store.current() == {}


def test_an_adapter_is_found_beside_a_folder_with_an_invalid_name(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    make(store.root / "law")
    make(store.root / "Not Sound")
    assert store.find("math").load(BASE)
    assert store.find("law").load(BASE)
    assert store.find(store.find("math").reference)
    assert store.alias("prod", "law")
    assert publish(store, tmp_path, "new")
    store.remove("new")


def test_the_version_of_an_alias_is_not_removed(store: AdapterStore, tmp_path: Path) -> None:
    version = publish(store, tmp_path, "math")
    store.alias("prod", "math")
    for reference in ("math", f"math@{version}"):
        with pytest.raises(AdapterError, match=r"means math@.*: move or remove the alias first"):
            store.remove(reference)
    store.remove("prod")
    assert list(store.current()) == ["math"]
    store.remove("math")
    assert store.list() == []


# --- explicit bases


def test_an_explicit_basis_is_published_too_and_stored_once(store: AdapterStore, tmp_path: Path) -> None:
    made = tmp_path / "made"
    basis = Explicit.from_tensors({name: Seeded(9).draw(name, RANK, n) for name, (_, n) in targeted(SHAPES).items()})
    for name, seed in (("a", 1), ("b", 2)):
        save(made / name, make_config(basis=Seeded(9)), make_modules(seed=seed), basis)
        store.publish(made / name)
    assert [file.name for file in (store.root / ".bases").iterdir()] == [f"{basis.content_digest}.safetensors"]
    a, b = store.find("a").load(BASE), store.find("b").load(BASE)
    assert a.basis is b.basis
    assert a.basis == basis
    basis_file(made, basis.content_digest).unlink()
    del a, b, basis
    with pytest.raises(AdapterFormatError, match="its basis cannot be read: No such file"):
        load_adapter(made / "a")


def explicit(seed: int = 9) -> Explicit:
    return Explicit.from_tensors({name: Seeded(seed).draw(name, RANK, n) for name, (_, n) in targeted(SHAPES).items()})


def test_publishing_repairs_a_damaged_basis(store: AdapterStore, tmp_path: Path) -> None:
    # Regression: the damaged basis was left. Publishing succeeded, but the adapter could not be loaded.
    basis = explicit()
    save(tmp_path / "a", make_config(basis=Seeded(9)), make_modules(), basis)
    for _ in range(2):
        store.publish(tmp_path / "a")
        assert load_basis(store.root, basis.content_digest) == basis
        basis_file(store.root, basis.content_digest).write_bytes(b"junk")
    store.publish(tmp_path / "a")
    assert basis_file(store.root, basis.content_digest).stat().st_size > 100


def test_a_basis_is_removed_with_the_last_adapter_that_needs_it(store: AdapterStore, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        save(tmp_path / name, make_config(basis=Seeded(9)), make_modules(seed=seed), explicit())
        store.publish(tmp_path / name)
    file = basis_file(store.root, explicit().content_digest)
    assert store.remove("a")
    assert file.exists()
    store.remove("b")
    assert not file.exists()


def test_a_basis_of_another_store_is_not_reused(store: AdapterStore, tmp_path: Path) -> None:
    save(tmp_path / "a", make_config(basis=Seeded(9)), make_modules(), explicit())
    store.publish(tmp_path / "a")
    held = store.find("a").load().basis
    basis_file(tmp_path, explicit().content_digest).unlink()
    with pytest.raises(AdapterFormatError, match="its basis cannot be read"):
        load_adapter(tmp_path / "a")
    assert held == explicit()


def test_a_damaged_basis_is_refused(store: AdapterStore) -> None:
    basis = Explicit.from_tensors({"m": Seeded(9).draw("m", 3, 5)})
    file, digest = save_basis(store.root, basis), basis.content_digest
    del basis
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(AdapterFormatError, match=f"expected {digest}"):
        load_basis(store.root, digest)


# --- many adapters


@pytest.mark.slow
def test_ten_thousand_adapters_are_listed_without_opening_one(store: AdapterStore) -> None:
    (store.root / ALIASES_FOLDER).mkdir(parents=True)
    for i in range(10_000):
        (store.root / f"tenant-{i:05}@{i:012x}").mkdir()  # an empty folder, which could not be opened
        (store.root / ALIASES_FOLDER / f"tenant-{i:05}").write_text(f"tenant-{i:05}@{i:012x}")
    assert len(store.list()) == len(store.current()) == 10_000
    assert store.find("tenant-04321").version == f"{4321:012x}"


# --- concurrent readers and writers


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


# --- regressions found by attempts to break the store


def test_nothing_of_a_newer_plain_folder_is_lost(store: AdapterStore, tmp_path: Path) -> None:
    # Regression: the folder was deleted with all its content, and the older record came back.
    publish(store, tmp_path, "math")
    folder = store.root / "math"
    shutil.copytree(tmp_path / "made" / "math", folder)
    config = load_adapter(folder).config
    write_record(folder, config.model_copy(update={"lori": config.lori.model_copy(update={"metrics": {"loss": 0.5}})}), "# new")
    (folder / "checkpoint.pt").write_text("x")
    with pytest.raises(AdapterError, match=r"and holds more: checkpoint\.pt; move that first"):
        store.publish(folder)
    (folder / "checkpoint.pt").unlink()
    store.publish(folder)
    assert store.find("math").load().config.lori.metrics == {"loss": 0.5}
    assert not folder.exists()


def test_a_name_that_is_an_alias_of_another_is_not_taken_over(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    store.alias("prod", "math")
    make(tmp_path / "law", 5)
    with pytest.raises(AdapterError, match=r"'prod' is an alias of math@.*: remove it first"):
        store.publish(tmp_path / "law", "prod")


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


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (".aliases/math", "cannot be read: .*it is not a regular file"),
        ("math/adapter_config.json", "adapter_config.json cannot be read: it is not a regular file"),
        ("math/adapter_model.safetensors", "adapter_model.safetensors cannot be read: it is not a regular file"),
    ],
)
def test_a_pipe_is_refused_and_not_waited_for(store: AdapterStore, place: str, message: str) -> None:
    make(store.root / "math")
    (store.root / place).unlink(missing_ok=True)
    (store.root / place).parent.mkdir(exist_ok=True)
    os.mkfifo(store.root / place)
    with pytest.raises(AdapterError, match=message):
        store.find("math").load()


def test_an_alias_file_that_is_too_long_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    (store.root / ALIASES_FOLDER / "prod").write_text("x" * 10_000)
    with pytest.raises(AdapterError, match="it has 10000 bytes, expected 200 at most"):
        store.find("prod")


def test_a_damaged_plain_folder_can_be_removed(store: AdapterStore, tmp_path: Path) -> None:
    make(store.root / "math")
    (store.root / "math" / CONFIG_FILE).write_text("{")
    make(tmp_path / "math", 3)
    with pytest.raises(AdapterError, match=r"is in the way, and not sound .*: remove it"):
        store.publish(tmp_path / "math")
    store.remove("math")
    assert store.publish(tmp_path / "math")


def test_removing_from_a_missing_folder_does_not_create_it(store: AdapterStore) -> None:
    with pytest.raises(AdapterError, match="is no folder of adapters"):
        store.remove("math")
    assert not store.root.exists()


def test_files_of_a_killed_writer_are_removed(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    (store.root / ".math@left").write_text("a file")
    (store.root / ".math@folder").mkdir()
    (store.root / ALIASES_FOLDER / ".math@left").write_text("x")
    publish(store, tmp_path, "math", 2)
    assert not list(store.root.rglob(".math@*"))


def test_a_plain_folder_made_in_another_way_is_not_lost(store: AdapterStore, tmp_path: Path) -> None:
    # A repeated reproducible training differs in its seconds. Regression: its metrics and card were deleted.
    make(tmp_path / "math", training={"seconds": 1})
    store.publish(tmp_path / "math")
    make(store.root / "math", training={"seconds": 2}, metrics={"loss": 0.5})
    with pytest.raises(AdapterError, match="was made in another way: remove one, or rename it"):
        store.publish(store.root / "math")
    assert load_adapter(store.root / "math").config.lori.metrics == {"loss": 0.5}


def test_an_alias_that_cannot_be_read_can_be_removed(store: AdapterStore, tmp_path: Path) -> None:
    # Regression: it blocked every removal.
    publish(store, tmp_path, "math")
    (store.root / ALIASES_FOLDER / "prod").write_text("junk")
    store.remove("math")
    store.remove("prod")
    assert store.current() == {}


def test_a_sound_version_is_not_replaced_by_a_damaged_folder(store: AdapterStore, tmp_path: Path) -> None:
    # Regression: the damaged weights replaced the sound ones without being read.
    publish(store, tmp_path, "math")
    published = store.find("math").folder
    shutil.copytree(published, store.root / "math")
    (store.root / "math" / WEIGHTS_FILE).write_bytes(b"xx")
    make(tmp_path / "math", 5)
    with pytest.raises(AdapterError, match="is in the way, and not sound"):
        store.publish(tmp_path / "math")
    assert load_adapter(published, BASE)


def test_an_ambiguous_name_is_not_removed(store: AdapterStore, tmp_path: Path) -> None:
    # Regression: the removal that the error advised for the folder removed every version.
    publish(store, tmp_path, "math")
    make(store.root / "math", 5)
    with pytest.raises(AdapterError, match=r"is an alias and a folder of its own .* `python -m lori import "):
        store.remove("math")
    assert len(store.list()) == 2


def test_a_version_is_found_beside_a_damaged_folder_of_its_name(store: AdapterStore, tmp_path: Path) -> None:
    version = publish(store, tmp_path, "math")
    (store.root / "math").mkdir()
    (store.root / "math" / CONFIG_FILE).write_text("{")
    assert store.find(f"math@{version}").load(BASE)
