"""Links in a store at an address. The store is a local folder, where fsspec's file system follows links by itself."""

from pathlib import Path

import pytest

from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError
from lori.format import CARD_FILE, WEIGHTS_FILE
from lori.store.aliases import ALIASES_FOLDER
from lori.store.remote import RemoteStore
from lori.store.remote_folder import RemoteFolder
from lori.store.store import AdapterStore
from lori.summary import summarise_sound
from tests.lori.adapters import BASE, make_config, make_modules, save

SECRET = "a secret of this machine"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """Return the shared store, with the adapters math and law."""
    store = AdapterStore(tmp_path / "shared")
    for seed, name in enumerate(("math", "law")):
        save(tmp_path / "made" / name, make_config(), make_modules(seed=seed))
        store.publish(tmp_path / "made" / name)
    return store


def remote(store: AdapterStore, tmp_path: Path) -> RemoteStore:
    return RemoteStore(RemoteFolder(f"file://{store.root}", 60), tmp_path / "cache", 2**30)


def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text(SECRET)
    return tmp_path / "secret"


def holds_secret(place: Path) -> bool:
    return any(SECRET in file.read_text(errors="replace") for file in place.rglob("*") if file.is_file())


@pytest.mark.parametrize("part", [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE])
@pytest.mark.parametrize("is_known", [False, True])
def test_a_linked_file_is_a_fault_and_never_fetched(store: AdapterStore, tmp_path: Path, part: str, is_known: bool) -> None:
    entry = store.find("math")
    mirrored = remote(store, tmp_path) if is_known else None
    (entry.folder / part).unlink(missing_ok=True)
    (entry.folder / part).symlink_to(secret(tmp_path))
    mirrored = mirrored or remote(store, tmp_path)
    mirrored.pull("math")
    sound, faulty = summarise_sound(mirrored.contents().current, BASE)
    assert [*sound] == ["law"]
    assert f"{part} cannot be read: it is a link, and a store follows none" in faulty["math"].faults
    if part == CARD_FILE:
        with pytest.raises(AdapterFormatError, match="it is a link"):
            mirrored.find("math").card()
    else:
        with pytest.raises(AdapterFormatError):
            mirrored.find("math").load()
    assert not holds_secret(tmp_path / "cache")


def test_a_linked_folder_is_a_fault_and_never_fetched(store: AdapterStore, tmp_path: Path) -> None:
    folder = store.find("math").folder
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    mirrored = remote(store, tmp_path)
    for _ in range(2):
        sound, faulty = summarise_sound(mirrored.contents().current, BASE)
        assert [*sound] == ["law"]
        assert "its folder is a link, and a store follows none" in faulty["math"].faults
        mirrored.pull("math")


def test_a_linked_alias_means_nothing(store: AdapterStore, tmp_path: Path) -> None:
    alias = store.root / ALIASES_FOLDER / "math"
    alias.rename(tmp_path / "alias")
    alias.symlink_to(tmp_path / "alias")
    mirrored = remote(store, tmp_path)
    for _ in range(2):
        assert [*mirrored.contents().current] == ["law"]
        assert "it is a link, and a store follows none" in mirrored.contents().faults["math"]
        mirrored.pull()


def test_an_alias_folder_that_is_a_link_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    (store.root / ALIASES_FOLDER).rename(tmp_path / "aliases")
    (store.root / ALIASES_FOLDER).symlink_to(tmp_path / "aliases")
    with pytest.raises(AdapterError, match="is a link: a store follows none"):
        remote(store, tmp_path)


def test_a_folder_with_an_invalid_name_is_reported_and_the_others_are_served(store: AdapterStore, tmp_path: Path) -> None:
    save(store.root / "Math", make_config(), make_modules())
    mirrored = remote(store, tmp_path)
    assert [*mirrored.contents().current] == ["law", "math"]
    assert "an adapter's name must match" in mirrored.contents().faults["Math"]
