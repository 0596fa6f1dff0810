"""Links and damaged files in a store: each is a fault of its adapter alone, and no link is followed."""

import os
from pathlib import Path

import pytest

from lori.basis import Explicit, Seeded
from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError
from lori.format import CARD_FILE, WEIGHTS_FILE
from lori.store.aliases import ALIASES_FOLDER
from lori.store.bases import basis_file
from lori.store.store import AdapterStore
from lori.summary import summarise_sound
from tests.lori.adapters import BASE, RANK, SHAPES, make_config, make_modules, save, targeted

PARTS = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)


def make(folder: Path, seed: int = 0) -> None:
    save(folder, make_config(), make_modules(seed=seed))


def publish(store: AdapterStore, tmp_path: Path, name: str, seed: int = 0) -> None:
    make(tmp_path / "made" / name, seed)
    store.publish(tmp_path / "made" / name)


def link_out(file: Path) -> None:
    """Move a file out of the store and leave a link to it."""
    elsewhere = file.parents[2] / f"elsewhere-{file.name}"
    if file.exists():
        file.rename(elsewhere)
    else:
        elsewhere.write_text("a secret")
    file.symlink_to(elsewhere)


@pytest.mark.parametrize("part", PARTS)
def test_a_linked_file_is_a_fault_of_its_adapter(store: AdapterStore, tmp_path: Path, part: str) -> None:
    for name in ("math", "law"):
        publish(store, tmp_path, name)
    entry = store.find("math")
    link_out(entry.folder / part)
    [error] = summarise_sound(store.contents().current, BASE)[1].values()
    assert f"{part} cannot be read: it is a link, and a store follows none" in error.faults
    with pytest.raises(AdapterFormatError, match=f"{part} cannot be read: it is a link"):
        entry.load()
    if part == CARD_FILE:
        with pytest.raises(AdapterFormatError, match="it is a link"):
            entry.card()
    assert [*summarise_sound(store.contents().current, BASE)[0]] == ["law"]


@pytest.mark.parametrize("target", ["../made/math", "nowhere", "math"])
def test_a_folder_that_is_a_link_is_a_fault_of_its_name_alone(store: AdapterStore, tmp_path: Path, target: str) -> None:
    publish(store, tmp_path, "law")
    make(tmp_path / "made" / "math")
    (store.root / "math").symlink_to(target)
    (tmp_path / "note").write_text("no adapter")
    (store.root / "notes").symlink_to(tmp_path / "note")
    (store.root / "others").symlink_to(tmp_path)
    sound, faulty = summarise_sound(store.contents().current, BASE)
    assert [*sound] == ["law"]
    assert [*faulty, *store.contents().faults] == ["math"]
    assert "is a link" in str([*store.contents().faults.values(), *faulty.values()])
    store.remove("math")
    assert not (store.root / "math").is_symlink()
    assert (tmp_path / "made" / "math" / CONFIG_FILE).is_file()


def test_an_alias_that_is_a_link_means_nothing(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math", 1)
    publish(store, tmp_path, "math", 2)
    link_out(store.root / ALIASES_FOLDER / "math")
    assert [*store.contents().current] == []
    assert "the alias" in store.contents().faults["math"]
    assert "it is a link, and a store follows none" in store.contents().faults["math"]


def test_an_explicit_basis_that_is_a_link_is_not_read(store: AdapterStore) -> None:
    basis = Explicit.from_tensors({name: Seeded(9).draw(name, RANK, n) for name, (_, n) in targeted(SHAPES).items()})
    save(store.root / "math", make_config(basis=Seeded(9)), make_modules(), basis)
    entry = store.find("math")
    link_out(basis_file(store.root, basis.content_digest))
    del basis
    with pytest.raises(AdapterFormatError, match="its basis cannot be read: it is a link"):
        entry.load()


@pytest.mark.parametrize("folder", [ALIASES_FOLDER, ".locks"])
def test_nothing_is_written_through_a_link_of_the_store(store: AdapterStore, tmp_path: Path, folder: str) -> None:
    publish(store, tmp_path, "math")
    elsewhere = tmp_path / "elsewhere"
    (store.root / folder).rename(elsewhere)
    (store.root / folder).symlink_to(elsewhere)
    before = {file.name: file.stat().st_mtime_ns for file in elsewhere.iterdir()}
    with pytest.raises(AdapterError, match="is a link: a store follows none"):
        publish(store, tmp_path, "law")
    assert {file.name: file.stat().st_mtime_ns for file in elsewhere.iterdir()} == before


def test_publishing_again_replaces_a_link(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    entry = store.find("math")
    link_out(entry.folder / WEIGHTS_FILE)
    target = (entry.folder / WEIGHTS_FILE).resolve()
    before = target.read_bytes()
    target.write_bytes(b"mine")
    store.publish(tmp_path / "made" / "math")
    assert not (entry.folder / WEIGHTS_FILE).is_symlink()
    assert (entry.folder / WEIGHTS_FILE).read_bytes() == before
    assert target.read_bytes() == b"mine"
    entry.load()


def test_a_volume_of_kubernetes_is_a_store_below_its_link(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    volume = tmp_path / "volume"
    volume.mkdir()
    store.root.rename(volume / "..2026")
    (volume / "..data").symlink_to("..2026")
    for name in os.listdir(volume / "..data"):
        (volume / name).symlink_to(f"..data/{name}")
    mounted = AdapterStore(volume / "..data")
    assert mounted.current()["math"].load().name == "math"
    with pytest.raises(AdapterError, match="is a link: a store follows none"):
        AdapterStore(volume).current()


@pytest.mark.parametrize("part", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_folder_with_any_file_of_an_adapter_is_a_damaged_adapter(store: AdapterStore, part: str) -> None:
    """Regression: a folder without its config did not count as an adapter, so a demo adapter of its name was served instead."""
    make(store.root / "math")
    (store.root / "math" / part).unlink()
    _, faulty = summarise_sound(store.contents().current, BASE)
    assert faulty["math"].faults[0] == f"{part} cannot be read: No such file or directory"


def test_truncated_weights_are_detected_from_their_header(store: AdapterStore) -> None:
    make(store.root / "math")
    file = store.root / "math" / WEIGHTS_FILE
    content = file.read_bytes()
    for length in (0, 7, 20, len(content) - 1):
        file.write_bytes(content[:length])
        _, faulty = summarise_sound(store.contents().current, BASE)
        assert f"has {length} bytes" in str(faulty["math"])
    file.write_bytes(content + b"\0")
    assert summarise_sound(store.contents().current, BASE)[1]
    file.write_bytes(content)
    assert not summarise_sound(store.contents().current, BASE)[1]
