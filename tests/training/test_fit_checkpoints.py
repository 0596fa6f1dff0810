"""Folder of a training run's checkpoints: refused if it is damaged, of another run, or in use."""

import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from lori.errors import LoriError
from tests.tiny import save_tiny_model
from tests.training.runs import config_for, cut_before_the_end, digest
from training.data import DataError
from training.fit import fit


@pytest.mark.slow
def test_an_interrupted_run_is_not_discarded(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, data, tmp_path / "cut")
    cut_before_the_end(config, 6)
    with pytest.raises(LoriError, match="did not end: --resume goes on with it; to start anew, remove it"):
        fit(config, "command")
    shutil.rmtree(tmp_path / "cut.checkpoint")
    assert fit(config, "command").is_dir()


@pytest.mark.slow
def test_resuming_a_finished_run_trains_nothing(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fit(config_for(tiny_model, data, tmp_path / "a"), "command")
    before = digest(folder)
    with monkeypatch.context() as patch:
        patch.setattr("training.fit.read_all", None)
        assert fit(config_for(tiny_model, data, tmp_path / "a", resume=True), "command") == folder
    assert "is there, and no run to go on with; without --resume it is trained anew" in caplog.text
    assert digest(folder) == before
    assert digest(fit(config_for(tiny_model, data, tmp_path / "a", seed=5), "command")) != before


@pytest.mark.slow
def test_an_older_adapter_is_not_the_result_of_a_run_interrupted_at_its_start(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    before = digest(fit(config_for(tiny_model, data, tmp_path / "a"), "command"))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.fit.load_base", die)
        with pytest.raises(KeyboardInterrupt):
            fit(config_for(tiny_model, data, tmp_path / "a", seed=5), "command")
    assert digest(fit(config_for(tiny_model, data, tmp_path / "a", seed=5, resume=True), "command")) != before
    assert not (tmp_path / "a.checkpoint").exists()


@pytest.mark.slow
def test_a_checkpoint_of_other_options_or_data_is_refused(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lori.store.store.save_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(config_for(tiny_model, data, tmp_path / "a"), "command")
    other_data = tmp_path / data.name
    other_data.write_text(data.read_text().replace("red", "RED"))
    for changes, message in (
        ({"lr": 0.5, "seed": 7}, "--lr is 0.5, expected absent; --seed is 7, expected 0: resume with those"),
        (
            {"data": [str(other_data)]},
            rf'--data is \["{other_data}"\], expected \["{data}"\]; the rows, as tokens, is "\w+", expected "\w+": ',
        ),
        ({"accumulation": 2}, "processes times --accumulation is 2, expected 1: resume"),
    ):
        with pytest.raises(LoriError, match="is of a run with other options, data or base: " + message):
            fit(config_for(tiny_model, data, tmp_path / "a", **{"resume": True, **changes}), "command")
    assert fit(config_for(tiny_model, data, tmp_path / "a", resume=True), "command").is_dir()


def test_a_damaged_run_file_is_named(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut"), at_step=2)
    (tmp_path / "cut.checkpoint" / "run.json").write_text("{")
    with pytest.raises(LoriError, match=r"run.json is damaged .*: remove .*cut.checkpoint"):
        fit(config_for(tiny_model, data, tmp_path / "cut", resume=True), "command")


def test_a_damaged_finished_phase_is_named(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut"), at_step=8)
    file = tmp_path / "cut.checkpoint" / "lori-d" / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(LoriError, match=r"lori-d is damaged .*: remove it, and resume"):
        fit(config_for(tiny_model, data, tmp_path / "cut", resume=True), "command")


def test_a_run_is_not_resumed_on_another_base_of_the_same_name(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    cut_before_the_end(config_for(model, data, tmp_path / "cut"), at_step=5)
    save_tiny_model(model, seed=1)
    with pytest.raises(LoriError, match="other options, data or base"):
        fit(config_for(model, data, tmp_path / "cut", resume=True), "command")


def test_a_folder_that_is_not_a_run_s_is_left_alone(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.checkpoint").mkdir()
    (tmp_path / "a.checkpoint" / "mine").write_text("precious")
    with pytest.raises(LoriError, match="is there and is of no run"):
        fit(config_for(tiny_model, data, tmp_path / "a"), "command")
    assert (tmp_path / "a.checkpoint" / "mine").read_text() == "precious"


@pytest.mark.slow
def test_an_interrupted_start_is_repeated(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """The folder has only the files that a start writes before `run.json`."""
    folder = tmp_path / "a.checkpoint"
    folder.mkdir()
    for name in ("threads.json", ".run.json@1234"):
        (folder / name).write_text("{")
    assert fit(config_for(tiny_model, data, tmp_path / "a"), "command").is_dir()


@pytest.mark.slow
def test_a_damaged_note_of_threads_is_named(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut"), 6)
    for note in ("[]", "null", '{"processes": 1, "threads": -1}', '{"threads": 2}'):
        (tmp_path / "cut.checkpoint" / "threads.json").write_text(note)
        with pytest.raises(DataError, match=r"threads\.json is damaged: remove it, and resume"):
            fit(config_for(tiny_model, data, tmp_path / "cut", resume=True), "command")
    (tmp_path / "cut.checkpoint" / "threads.json").unlink()
    assert fit(config_for(tiny_model, data, tmp_path / "cut", resume=True), "command").is_dir()


def test_two_runs_do_not_write_to_one_output(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.checkpoint").mkdir()
    for files in ([], ["run.json"]):  # before and after the other run has written its identity
        for name in files:
            (tmp_path / "a.checkpoint" / name).write_text("{}")
        with FileLock(tmp_path / "a.checkpoint" / "lock"), pytest.raises(LoriError, match="another run is writing to"):
            fit(config_for(tiny_model, data, tmp_path / "a"), "command")


def test_an_unfinished_run_is_refused_before_the_base_is_loaded(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.checkpoint").mkdir()
    (tmp_path / "a.checkpoint" / "run.json").write_text("{}")
    monkeypatch.setattr("training.fit.load_base", lambda *_: pytest.fail("the base is loaded"))
    with pytest.raises(LoriError, match="did not end: --resume goes on with it"):
        fit(config_for(tiny_model, data, tmp_path / "a"), "command")
