"""Plain folders in a store, beside published versions: none is lost, and none is taken for another."""

import os
import shutil
from pathlib import Path

import pytest

from lori.config import CONFIG_FILE
from lori.errors import AdapterError
from lori.format import WEIGHTS_FILE, load_adapter, write_record
from lori.prompt_statistics import STATISTICS_FILE
from lori.store.store import AdapterStore
from tests.lori.adapters import BASE, make, make_config, make_modules, publish, save, write_statistics


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


def test_nothing_of_a_newer_plain_folder_is_lost(store: AdapterStore, tmp_path: Path) -> None:
    # Regression: the folder was deleted with all its content, and the older record came back.
    publish(store, tmp_path, "math")
    folder = store.root / "math"
    shutil.copytree(tmp_path / "made" / "math", folder)
    config = load_adapter(folder).config
    write_record(folder, config.model_copy(update={"lori": config.lori.model_copy(update={"metrics": {"loss": 0.5}})}), "# new")
    statistics = write_statistics(folder)
    (folder / "checkpoint.pt").write_text("x")
    with pytest.raises(AdapterError, match=r"and holds more: checkpoint\.pt; move that first"):
        store.publish(folder)
    (folder / "checkpoint.pt").unlink()
    store.publish(folder)
    assert store.find("math").load().config.lori.metrics == {"loss": 0.5}
    assert (store.find("math").folder / STATISTICS_FILE).read_bytes() == statistics
    assert not folder.exists()


def test_statistics_of_a_version_are_replaced_and_damaged_ones_removed(store: AdapterStore, tmp_path: Path) -> None:
    save(tmp_path / "math", make_config(training={"way": "one"}), make_modules())
    folder = store.publish(tmp_path / "math").folder
    (folder / STATISTICS_FILE).write_bytes(b"x")
    store.publish(tmp_path / "math")
    assert not (folder / STATISTICS_FILE).exists()
    save(tmp_path / "math", make_config(training={"way": "other"}), make_modules())
    statistics = write_statistics(tmp_path / "math")
    store.publish(tmp_path / "math")
    assert (folder / STATISTICS_FILE).read_bytes() == statistics
    assert load_adapter(folder).config.lori.training == {"way": "one"}
    (tmp_path / "math" / STATISTICS_FILE).unlink()
    store.publish(tmp_path / "math")
    assert (folder / STATISTICS_FILE).read_bytes() == statistics, "sound ones stay"


@pytest.mark.parametrize("name", [STATISTICS_FILE, "adapter_config.json", "README.md"])
def test_a_folder_in_place_of_a_file_is_damage_that_publishing_mends(store: AdapterStore, tmp_path: Path, name: str) -> None:
    save(tmp_path / "math", make_config(), make_modules())
    (tmp_path / "math" / "README.md").write_text("# math")
    write_statistics(tmp_path / "math")
    folder = store.publish(tmp_path / "math").folder
    sound = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name / "deeper").mkdir(parents=True)
    store.publish(tmp_path / "math")
    assert (folder / name).read_bytes() == sound
    (folder / STATISTICS_FILE).unlink()
    (folder / STATISTICS_FILE).mkdir()
    (tmp_path / "math" / STATISTICS_FILE).unlink()
    store.publish(tmp_path / "math")
    assert not (folder / STATISTICS_FILE).exists(), "there are none to put in its place"


def test_an_alias_of_the_reserved_name_is_a_fault(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    (store.root / ".aliases" / "auto").write_text((store.root / ".aliases" / "math").read_text())
    contents = store.contents()
    assert [*contents.current] == ["math"]
    assert "'auto' is reserved" in contents.faults["auto"]
    with pytest.raises(AdapterError, match="'auto' is reserved"):
        store.alias("auto", "math")


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


def test_a_damaged_plain_folder_can_be_removed(store: AdapterStore, tmp_path: Path) -> None:
    make(store.root / "math")
    (store.root / "math" / CONFIG_FILE).write_text("{")
    make(tmp_path / "math", 3)
    with pytest.raises(AdapterError, match=r"is in the way, and not sound .*: remove it"):
        store.publish(tmp_path / "math")
    store.remove("math")
    assert store.publish(tmp_path / "math")


def test_a_plain_folder_made_in_another_way_is_not_lost(store: AdapterStore, tmp_path: Path) -> None:
    # A repeated reproducible training differs in its seconds. Regression: its metrics and card were deleted.
    make(tmp_path / "math", training={"seconds": 1})
    store.publish(tmp_path / "math")
    make(store.root / "math", training={"seconds": 2}, metrics={"loss": 0.5})
    with pytest.raises(AdapterError, match="was made in another way: remove one, or rename it"):
        store.publish(store.root / "math")
    assert load_adapter(store.root / "math").config.lori.metrics == {"loss": 0.5}


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
