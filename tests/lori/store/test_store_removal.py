"""Removal of versions, names and aliases from a store."""

import shutil
from pathlib import Path

import pytest

from lori.errors import AdapterError, UnknownAdapterError
from lori.store.aliases import ALIASES_FOLDER
from lori.store.store import AdapterStore
from tests.lori.adapters import publish


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


def test_removing_from_a_missing_folder_does_not_create_it(store: AdapterStore) -> None:
    with pytest.raises(AdapterError, match="is no folder of adapters"):
        store.remove("math")
    assert not store.root.exists()


def test_an_alias_that_cannot_be_read_can_be_removed(store: AdapterStore, tmp_path: Path) -> None:
    # Regression: it blocked every removal.
    publish(store, tmp_path, "math")
    (store.root / ALIASES_FOLDER / "prod").write_text("junk")
    store.remove("math")
    store.remove("prod")
    assert store.current() == {}
