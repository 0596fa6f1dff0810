"""Options of `training.fit`, and its command line: those that do not go together are refused at once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lori.errors import LoriError
from tests.training.runs import config_for, flags_for
from training.config import FitConfig
from training.fit import command_of, fit, main


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.5], [0.5, 0.7, 1.0]])
def test_a_range_of_weights_has_two_ends(tiny_model: Path, data: Path, tmp_path: Path, weights: list[float]) -> None:
    with pytest.raises(ValueError, match="two numbers, the lower one first"):
        config_for(tiny_model, data, tmp_path, weight_range=weights)


def test_a_missing_extra_is_reported_before_the_run_begins(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LoriError, match="--tensorboard needs: pip install"):
        fit(config_for(tiny_model, data, tmp_path / "a", tensorboard=tmp_path / "logs"), "command")
    assert not (tmp_path / "a.checkpoint").exists()


def test_a_held_out_fraction_that_leaves_nothing_is_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(LoriError, match="leaves nothing to learn: there are 30 rows"):
        fit(config_for(tiny_model, data, tmp_path / "a", held_out_fraction=0.99), "command")


def test_options_without_effect_are_refused_at_once(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--sparsity is for --method lori; --beta is for .*; --patience is for"):
        config_for(tiny_model, data, tmp_path / "a", method="lora", sparsity=0.5, beta=1.0, patience=2)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("--save-every is for runs without held-out rows", {"held_out_fraction": 0.2, "save_every": 2}),
        ("--epochs is for --steps 0", {"steps": 2, "epochs": 3.0}),
        ("--calibration-epochs is for --calibration-steps 0", {"calibration_steps": 2, "calibration_epochs": 0.1}),
        ("--basis-seed is for LoRI", {"method": "lora", "basis_seed": 1}),
        ("--stream is for LoRI", {"method": "lora", "stream": 1}),
        ("--batch-tokens is for --batch-size 0", {"batch_size": 8, "batch_tokens": 4096}),
    ],
)
def test_a_flag_without_effect_beside_another_is_refused(message: str, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        FitConfig.model_validate({"data": ["d"], "output": "a", **changes})
    for name in changes:
        remaining = {key: value for key, value in changes.items() if key != name}
        assert FitConfig.model_validate({"data": ["d"], "output": "a", **remaining})


def test_a_recipes_options_may_have_no_effect_for_another_method(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("sparsity: 0.8\ncalibration_lr: 0.001\n")
    assert config_for(tiny_model, data, tmp_path / "a", recipe=str(recipe), method="lora").sparsity == 0.8
    with pytest.raises(ValueError, match="--granularity is for --method lori"):
        config_for(tiny_model, data, tmp_path / "a", recipe=str(recipe), method="lora", granularity="layer")


def test_a_command_is_given_with_its_processes() -> None:
    flags = ["--data", "my rows.jsonl", "--resume"]
    assert command_of(flags, {}) == command_of(flags, {"WORLD_SIZE": "1"}) == "python -m training.fit --data 'my rows.jsonl'"
    two_by_four = {"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}
    assert command_of([], two_by_four) == "torchrun --nnodes 2 --nproc-per-node 4 -m training.fit"


def test_one_process_cannot_shard_the_base(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(LoriError, match="--fsdp spreads the base over processes, and there is one: torchrun"):
        fit(config_for(tiny_model, data, tmp_path / "a", fsdp=True), "command")


def test_a_report_that_would_be_a_folder_is_refused_at_once(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--report .* is a folder, expected a file's name, such as .*report\.html"):
        config_for(tiny_model, data, tmp_path / "a", report=tmp_path)


@pytest.mark.parametrize("folder", [".", "a", "a/logs", "a.checkpoint/../a"])
def test_logs_do_not_go_into_the_adapter_s_own_folder(folder: str) -> None:
    """Regression: an adapter was trained, and then not saved because its logs had created a folder of its name."""
    with pytest.raises(ValueError, match=r"--tensorboard .* puts its logs, a/…, into the adapter's own folder"):
        FitConfig.model_validate({"data": ["d"], "output": "a", "tensorboard": folder})
    assert FitConfig.model_validate({"data": ["d"], "output": "a", "tensorboard": "logs"})


@pytest.mark.parametrize("report", ["a/report.html", "a.checkpoint/report.html"])
def test_a_report_is_not_written_into_a_folder_that_training_replaces(report: str) -> None:
    with pytest.raises(ValueError, match="--report is in the adapter's own folder or that of its checkpoints"):
        FitConfig.model_validate({"data": ["d"], "output": "a", "report": report})


@pytest.mark.slow
def test_the_command_shows_its_progress(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_for(tiny_model, data, tmp_path / "a", mix=[], steps=3)
    done = subprocess.run([sys.executable, "-m", "training.fit", *flags], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"saved {tmp_path / 'a'}\n")
    for phase in ("LoRI-D", "LoRI-S"):
        assert re.search(rf"{phase}: .*3/3 .*loss=\d+\.\d+, tokens_per_s=\d+", done.stderr)
    monkeypatch.setattr(sys, "argv", ["fit", *flags, "--resume"])
    assert main() == 0
    assert capsys.readouterr().out == f"found {tmp_path / 'a'}\n"


def test_the_command_reports_errors(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fit", *flags])
        with pytest.raises(SystemExit) as end:
            sys.exit(main())
        assert isinstance(end.value.code, int)
        return end.value.code, capsys.readouterr().err

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p"}\n')
    flags = ["--data", str(bad), "--model", str(tiny_model), "--output", str(tmp_path / "x")]
    code, message = wrong(*flags)
    assert code == 1
    assert f"  no completion: 1\n    {bad} line 1" in message
    code, message = wrong("--sparsity", "1.5", *flags)
    assert code == 2
    assert "--sparsity: Input should be less than 1" in message
    assert wrong("--target-modules", "c_attn", *flags)[0] == 1
    assert wrong("--stpes", "3") == (2, "error: there is no flag --stpes: did you mean --steps?\n")
    code, message = wrong("--method", "lora", "--avoid", "x", *flags)
    assert code == 2
    assert "--avoid is for --method lori" in message
