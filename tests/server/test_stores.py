"""The adapters that a server is started with."""

from pathlib import Path

import pytest

from lori.config_file import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError
from lori.format import WEIGHTS_FILE
from lori.names import unknown_adapter
from lori.store import AdapterStore
from server.stores import load_all
from tests.lori.adapters import BASE, make_config, make_modules, save


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
    # Was an empty store: nothing was served, and nothing said.
    with pytest.raises(AdapterError, match="is an adapter, expected a folder of adapters"):
        folders(touch(tmp_path, "math") / "math")


@pytest.mark.parametrize("name", ["Math", "ma th", "-math", "_math", "máth", "a" * 65, "math+law", "math\n", "math@XYZ"])
def test_a_name_that_is_not_sound_is_refused(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    with pytest.raises(AdapterError, match="an adapter's name must match") as caught:
        folders(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "a.b-c_d"])
def test_a_sound_name_is_accepted(tmp_path: Path, name: str) -> None:
    assert list(folders(touch(tmp_path, name))) == [name]


@pytest.mark.parametrize("name", ["none", "a-file"])
def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a-file").write_text("x")
    with pytest.raises(AdapterError, match="is no folder of adapters") as caught:
        folders(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_every_adapter_is_loaded_under_the_name_it_is_asked_for_by(tmp_path: Path) -> None:
    for seed, name in enumerate(["b", "a"]):
        save(tmp_path / name, make_config(), make_modules(seed=seed))
    AdapterStore(tmp_path).alias("prod", "a")
    adapters = load_all(AdapterStore(tmp_path).current(), BASE)
    assert [adapter.name for adapter in adapters] == ["a", "b", "prod"]
    assert adapters[0].version == adapters[2].version != adapters[1].version


def test_load_all_gathers_the_faults_of_all_bad_adapters(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / name, make_config(), make_modules())
    (tmp_path / "a" / WEIGHTS_FILE).unlink()
    (tmp_path / "c" / CONFIG_FILE).write_text('{"r": 0}')
    with pytest.raises(AdapterFormatError) as caught:
        load_all(AdapterStore(tmp_path).current(), BASE)
    faults = caught.value.faults
    assert f"{tmp_path / 'a'}: {WEIGHTS_FILE} cannot be read: No such file or directory" in faults
    assert any(fault.startswith(f"{tmp_path / 'c'}: {CONFIG_FILE}: r: ") for fault in faults)
    assert any(fault.startswith(f"{tmp_path / 'c'}: {CONFIG_FILE}: lora_alpha: ") for fault in faults)
    assert not any(fault.startswith(f"{tmp_path / 'b'}: ") for fault in faults)
    assert all(fault in str(caught.value) for fault in faults)


def test_near_names_are_told_nearest_first() -> None:
    error = unknown_adapter("saftey", iter(["math", "safety", "safe", "nlu"]))
    assert error.name == "saftey"
    assert error.near == ("safety", "safe")
    assert str(error) == "there is no adapter 'saftey': did you mean 'safety' or 'safe'?"


def test_known_names_are_told_in_order_where_none_is_near() -> None:
    assert str(unknown_adapter("zzz", ["math", "code"])) == "there is no adapter 'zzz': known are 'code', 'math'"


def test_at_most_three_near_names() -> None:
    assert len(unknown_adapter("math", [f"math{i}" for i in range(9)]).near) == 3
