"""A folder of adapters: publishing, versions, aliases and explicit bases."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lori.basis import Explicit, Seeded
from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError, UnknownAdapterError
from lori.format import WEIGHTS_FILE, load_adapter, write_record
from lori.store.aliases import ALIASES_FOLDER
from lori.store.bases import basis_file, load_basis, save_basis
from lori.store.store import AdapterStore
from tests.lori.adapters import BASE, RANK, SHAPES, make, make_config, make_modules, publish, save, targeted

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


@pytest.mark.slow
def test_ten_thousand_adapters_are_listed_without_opening_one(store: AdapterStore) -> None:
    (store.root / ALIASES_FOLDER).mkdir(parents=True)
    for i in range(10_000):
        (store.root / f"tenant-{i:05}@{i:012x}").mkdir()  # an empty folder, which could not be opened
        (store.root / ALIASES_FOLDER / f"tenant-{i:05}").write_text(f"tenant-{i:05}@{i:012x}")
    assert len(store.list()) == len(store.current()) == 10_000
    assert store.find("tenant-04321").version == f"{4321:012x}"


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


def test_a_name_that_is_an_alias_of_another_is_not_taken_over(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    store.alias("prod", "math")
    make(tmp_path / "law", 5)
    with pytest.raises(AdapterError, match=r"'prod' is an alias of math@.*: remove it first"):
        store.publish(tmp_path / "law", "prod")


def test_an_alias_file_that_is_too_long_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, tmp_path, "math")
    (store.root / ALIASES_FOLDER / "prod").write_text("x" * 10_000)
    with pytest.raises(AdapterError, match="it has 10000 bytes, expected 200 at most"):
        store.find("prod")


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
