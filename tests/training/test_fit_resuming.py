"""Interrupted training runs: resumed, each gives the same bytes as without the interruption."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from lori.format import read_config
from tests.training.forked import train
from tests.training.runs import config_for, cut_before_the_end, digest
from training.checkpoints import MarkComplete
from training.fit import fit
from training.run import Run


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from a dtype to the digest of an adapter trained without interruption, with the options of `FIELDS`."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def digest_of(dtype: str) -> str:
        return digest(fit(config_for(tiny_model, data, folder / dtype, dtype=dtype), "command"))

    return digest_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("die_at", "dtype"), [(1, "float32"), (3, "float32"), (6, "float32"), (9, "float32"), (4, "bfloat16"), (9, "bfloat16")]
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    tiny_model: Path, data: Path, tmp_path: Path, uninterrupted: Callable[[str], str], die_at: int, dtype: str
) -> None:
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut", dtype=dtype), die_at)
    assert (tmp_path / "cut.checkpoint").exists()
    assert not (tmp_path / "cut").exists()
    resumed = fit(config_for(tiny_model, data, tmp_path / "cut", dtype=dtype, resume=True), "command")
    assert digest(resumed) == uninterrupted(dtype)


@pytest.mark.slow
def test_a_card_s_seconds_are_those_of_all_parts_of_a_run(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    seconds_file = tmp_path / "cut.checkpoint" / "seconds.json"
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut"), 9)
    assert json.loads(seconds_file.read_text()) > 0
    seconds_file.write_text("1000.0")
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut", resume=True), 1)
    assert json.loads(seconds_file.read_text()) > 1000
    seconds_file.write_text("3000.0")
    resumed = fit(config_for(tiny_model, data, tmp_path / "cut", resume=True), "command")
    assert 3000 <= read_config(resumed).lori.training["seconds"] < 4000


def test_a_resumed_run_uses_the_new_checkpoint_interval(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    on_save = MarkComplete.on_save

    def note(
        self: MarkComplete, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: object
    ) -> None:
        saved.append(state.global_step)
        on_save(self, args, state, control, **options)

    monkeypatch.setattr(MarkComplete, "on_save", note)
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "a", method="lori-d"), at_step=4)
    assert saved == [2]
    fit(config_for(tiny_model, data, tmp_path / "a", method="lori-d", resume=True, save_every=1), "command")
    assert saved == [2, 3, 4, 5, 6]


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, complete or not."""
    return max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "steps", "marks"), [("float32", 36, ["lori-d/6", "lori-d/21", "lori-s/12"]), ("bfloat16", 18, ["lori-d/6"])]
)
def test_a_killed_run_resumes_to_the_same_bytes(
    tiny_model: Path, data: Path, tmp_path: Path, dtype: str, steps: int, marks: list[str]
) -> None:
    """SIGKILL ends the run at any point, and the same command resumes it, with the tests' number of threads."""
    changes = {"steps": steps, "held_out_fraction": 0.2, "eval_every": 3, "dtype": dtype, "threads": 1}
    whole = fit(config_for(tiny_model, data, tmp_path / "whole", **changes), "command")
    config = config_for(tiny_model, data, tmp_path / "cut", **changes, resume=True)
    folder = tmp_path / "cut.checkpoint"
    for mark in marks:
        process = train(config)
        phase, step = mark.split("/")
        while process.exitcode is None and newest_step(folder / phase) < int(step):
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    process = train(config)
    process.join()
    assert process.exitcode == 0
    assert digest(tmp_path / "cut") == digest(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "resumed"), [({}, 2), ({"threads": 3}, 3)])
def test_a_resumed_run_uses_its_original_number_of_threads(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int], resumed: int
) -> None:
    """The number of threads determines the order of sums, and so the bytes. It must not depend on the load of the CPUs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut", **options), 6)
        torch.set_num_threads(1)
        done = fit(config_for(tiny_model, data, tmp_path / "cut", resume=True, **options), "command")
        assert torch.get_num_threads() == resumed
        assert read_config(done).lori.training["threads"] == resumed
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("is_over", [False, True])
def test_a_resumed_run_stops_early_at_the_same_step_as_an_uninterrupted_one(
    tiny_model: Path, data: Path, tmp_path: Path, is_over: bool
) -> None:
    """Regression: a resumed run counted the evaluations from zero again, and trained on after it should have stopped."""
    changes = {
        "steps": 60, "held_out": [str(data)], "eval_every": 1, "patience": 2, "mix": [], "method": "lori-d", "calibration_lr": 1.0
    }  # fmt: skip
    outcomes: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "close", lambda self: outcomes.update({self.config.output.name: self.outcomes["LoRI-D"]}))
        uninterrupted = fit(config_for(tiny_model, data, tmp_path / "whole", **changes), "")
        num_steps = len(outcomes["whole"].losses)  # type: ignore[attr-defined]
        cut = config_for(tiny_model, data, tmp_path / "cut", **changes)
        if is_over:
            with pytest.MonkeyPatch.context() as kill:
                kill.setattr("training.run.outcome_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    fit(cut, "")
        else:
            cut_before_the_end(cut, at_step=num_steps)
        fit(cut.model_copy(update={"resume": True}), "")
    assert num_steps < 60
    assert outcomes["cut"] == outcomes["whole"]
    assert digest(cut.output) == digest(uninterrupted)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_resumed(
    tiny_model: Path, data: Path, tmp_path: Path, uninterrupted: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut"), at_step=5)
    shutil.copytree(tmp_path / "cut.checkpoint", tmp_path / "kept")
    for damage in ("model.safetensors", "optimizer.pt", "trainer_state.json", "whole.json"):
        file = tmp_path / "cut.checkpoint" / "lori-d" / "checkpoint-4" / damage
        file.write_bytes(file.read_bytes()[:-1])
        resumed = fit(config_for(tiny_model, data, tmp_path / "cut", resume=True), "command")
        assert "checkpoint-4 is damaged" in caplog.text, damage
        assert digest(resumed) == uninterrupted("float32"), damage
        caplog.clear()
        shutil.rmtree(resumed)
        shutil.copytree(tmp_path / "kept", tmp_path / "cut.checkpoint")


@pytest.mark.slow
def test_a_rewritten_checkpoint_is_complete(
    tiny_model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: the marker of the damaged checkpoint was counted as one of the checkpoint's files."""
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut"), at_step=5)
    file = tmp_path / "cut.checkpoint" / "lori-d" / "checkpoint-4" / "model.safetensors"
    file.write_bytes(b"")
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut", resume=True), at_step=3)
    assert "checkpoint-4 is damaged" in caplog.text
    caplog.clear()
    fit(config_for(tiny_model, data, tmp_path / "cut", resume=True), "command")
    assert "is damaged" not in caplog.text


@pytest.mark.slow
def test_another_number_of_processes_ignores_the_saved_threads(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """The saved number of threads is for a run with the same number of processes."""
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut"), 6)
    (tmp_path / "cut.checkpoint" / "threads.json").write_text('{"processes": 2, "threads": 7}')
    fit(config_for(tiny_model, data, tmp_path / "cut", resume=True), "command")
    assert torch.get_num_threads() == 1
