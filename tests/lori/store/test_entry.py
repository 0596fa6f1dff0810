"""Folders of a store that are adapters."""

from pathlib import Path

import pytest

from lori.config import CONFIG_FILE
from lori.errors import AdapterError
from lori.store.store import AdapterStore


def touch(place: Path, *names: str) -> Path:
    for name in names:
        (place / name).mkdir(parents=True)
        (place / name / CONFIG_FILE).write_text("{}")
    return place


def folders(place: Path) -> dict[str, Path]:
    return {name: entry.folder for name, entry in AdapterStore(place).current().items()}


def test_folders_are_found_by_name(tmp_path: Path) -> None:
    place = touch(tmp_path, "safety-2.0", "math", "0_law")
    assert folders(place) == {name: place / name for name in ("0_law", "math", "safety-2.0")}
    assert list(folders(place)) == ["0_law", "math", "safety-2.0"]


def test_an_empty_folder_holds_no_adapters(tmp_path: Path) -> None:
    assert folders(tmp_path) == {}


def test_hidden_folders_files_and_folders_without_a_config_are_no_adapters(tmp_path: Path) -> None:
    touch(tmp_path, "math", ".math-scratch", "outer/inner")
    (tmp_path / "Not An Adapter").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert list(folders(tmp_path)) == ["math"]


def test_an_adapter_is_no_folder_of_adapters(tmp_path: Path) -> None:
    # Regression: it counted as an empty store, so nothing was served, without an error.
    with pytest.raises(AdapterError, match="is an adapter, expected a folder of adapters"):
        folders(touch(tmp_path, "math") / "math")


@pytest.mark.parametrize("name", ["Math", "ma th", "-math", "_math", "máth", "a" * 65, "math+law", "math\n", "math@XYZ"])
def test_an_invalid_name_is_refused(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    with pytest.raises(AdapterError, match="an adapter's name must match") as caught:
        folders(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "a.b-c_d"])
def test_a_valid_name_is_accepted(tmp_path: Path, name: str) -> None:
    assert list(folders(touch(tmp_path, name))) == [name]


@pytest.mark.parametrize("name", ["none", "a-file"])
def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a-file").write_text("x")
    with pytest.raises(AdapterError, match="is no folder of adapters") as caught:
        folders(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
