"""`training.fit` as its users meet it: a command, a folder, a checkpoint."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lori.base_model import load_base_model
from lori.format import load_adapter
from training.config import FitConfig
from training.fit import Run, fit, load_examples
from training.loop import Phase
from training.packing import ATTENTION
from training.trainable import DenseDelta, MaskedDelta

WORDS = ["red", "blue", "green", "black", "white"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [{"prompt": f"Say {word} {i}:", "completion": f" {word}"} for i in range(6) for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(tiny_model: Path, data: Path, output: Path, **changes: object) -> FitConfig:
    fields = {
        "data": [str(data)], "mix": [str(data)], "mix_fraction": 0.2, "model": str(tiny_model), "output": output,
        "steps": 6, "rank": 4, "alpha": 8, "batch_tokens": 200, "dtype": "float32", "save_every": 2, "template": ["plain"],
    }  # fmt: skip
    return FitConfig.model_validate(fields | changes)


def digests(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_the_adapter_is_as_the_method_says(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    folder = fit(config_for(tiny_model, data, tmp_path / "colours"), "command")
    base = load_base_model(str(tiny_model), torch.float32)
    adapter = load_adapter(folder, base.identity)
    total = sum(b.num_entries for b in adapter.modules.values())
    assert adapter.num_kept == round(total * 0.1)
    assert len(adapter.modules) == 7 * 2
    assert any(b.values.any() for b in adapter.modules.values())
    record = adapter.config.lori.training
    assert record["phases"]["LoRI-D"]["steps"] == record["phases"]["LoRI-S"]["steps"] == 6
    assert record["command"] == "command"
    assert not list(tmp_path.glob("*.checkpoint"))


def test_the_second_phase_starts_from_zero_on_the_largest_entries_of_the_first(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}
    run_phase = Phase.run

    def run(self: Phase, save_every: int, save: object) -> None:
        layers = [m for m in self.model.modules() if isinstance(m, DenseDelta | MaskedDelta)]
        if self.name == "LoRI-S":
            assert not any(p.any() for p in self.parameters.values())
            kept = torch.cat([layer.positions + i * 10**6 for i, layer in enumerate(layers)])
            assert torch.equal(kept.sort().values, seen["largest"].sort().values)
        run_phase(self, save_every, save)
        if self.name == "LoRI-D":
            flat = torch.cat([layer.dense().abs().flatten() for layer in layers])
            places = torch.cat([torch.arange(layer.dense().numel()) + i * 10**6 for i, layer in enumerate(layers)])
            seen["largest"] = places[flat.topk(round(flat.numel() * 0.1)).indices]

    monkeypatch.setattr(Phase, "run", run)
    fit(config_for(tiny_model, data, tmp_path / "colours"), "command")
    assert "largest" in seen


def test_training_lowers_the_loss(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, data, tmp_path / "colours", steps=40, mix=[], rank=16, alpha=32)
    base = load_base_model(str(tiny_model), torch.float32, attention=ATTENTION)
    run = Run(config, base, *load_examples(config, base))
    run.train()
    losses = run.losses["LoRI-S"]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("die_at", [3, 9])
def test_a_killed_run_resumes_to_the_same_bytes(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    whole = fit(config_for(tiny_model, data, tmp_path / "whole"), "command")
    steps = 0
    train_on = Phase._train_on

    def die(self: Phase, examples: object) -> float:
        nonlocal steps
        steps += 1
        if steps == die_at:
            raise KeyboardInterrupt
        return train_on(self, examples)

    monkeypatch.setattr(Phase, "_train_on", die)
    with pytest.raises(KeyboardInterrupt):
        fit(config_for(tiny_model, data, tmp_path / "cut"), "command")
    assert (tmp_path / "cut.checkpoint").exists()
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(Phase, "_train_on", train_on)
    resumed = fit(config_for(tiny_model, data, tmp_path / "cut", resume=True), "command")
    assert digests(resumed) == digests(whole)


def test_a_checkpoint_of_other_options_is_refused(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.loop.Phase._train_on", lambda *_: 1.0)
    monkeypatch.setattr("training.fit.save_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fit(config_for(tiny_model, data, tmp_path / "a"), "command")
    with pytest.raises(Exception, match="is of a run with other options"):
        fit(config_for(tiny_model, data, tmp_path / "a", resume=True, lr=0.5), "command")


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "training.fit", *arguments], capture_output=True, text=True, check=False)


def test_the_command_says_what_is_wrong(tiny_model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p"}\n')
    flags = ["--model", str(tiny_model), "--output", str(tmp_path / "x")]
    done = run_command("--data", str(bad), *flags)
    assert done.returncode == 1
    assert f"  no completion: 1\n    {bad} line 1" in done.stderr
    done = run_command("--data", str(bad), "--sparsity", "1.5", *flags)
    assert done.returncode == 2
    assert "--sparsity: Input should be less than 1" in done.stderr
    done = run_command("--data", str(bad), "--target-modules", "c_attn", *flags)
    assert done.returncode == 1
    assert run_command("--no-such-flag").returncode == 2
