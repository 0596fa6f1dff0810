"""`training.fit` from the outside: its command line, the adapter's folder, checkpoints and resuming."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from transformers import MistralConfig, TrainerControl, TrainerState, TrainingArguments

from lori.base_model import load_base_model
from lori.errors import LoriError
from lori.format import load_adapter, read_config
from lori.merge import merge
from lori.sparse import SparseB
from lori.template import encode
from tests.tiny import save_tiny_model, tiny_llama_config
from tests.training.forked import train, train_together
from training.checkpoints import MarkComplete
from training.config import FitConfig
from training.data import DataError
from training.evaluation.local_adapters import apply_adapter
from training.fit import command_of, fit, main
from training.methods import Lori
from training.phase import Phase, recent_loss
from training.run import Run
from training.trainable import DenseB, MaskedB
from training.trainer import PhaseTrainer

WORDS = ["red", "blue", "green", "black", "white"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [{"prompt": f"Say {word} {i}:", "completion": f" {word}"} for i in range(6) for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FIELDS: Mapping[str, object] = {
    "mix_fraction": 0.2, "steps": 6, "rank": 4, "alpha": 8, "batch_tokens": 200, "dtype": "float32", "save_every": 2,
    "template": ["plain"],
}  # fmt: skip


def config_for(tiny_model: Path, rows: Path, output: Path, **changes: object) -> FitConfig:
    paths = {"data": [str(rows)], "mix": [str(rows)], "model": str(tiny_model), "output": output}
    fields = {**FIELDS, **paths, **changes}
    if not fields["mix"]:
        del fields["mix_fraction"]
    if {"held_out", "held_out_fraction"} & fields.keys():
        fields.pop("save_every", None)
    return FitConfig.model_validate(fields)


def flags_for(tiny_model: Path, rows: Path, output: Path, **changes: object) -> list[str]:
    """Return the command line of the config that `config_for` returns."""
    config = config_for(tiny_model, rows, output, **changes).model_dump(exclude_unset=True)
    flags = []
    for name, value in config.items():
        for item in value if isinstance(value, list) else [value]:
            flag = f"--{name.replace('_', '-')}"
            flags += [flag] if item is True else [flag, str(item)]
    return flags


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def modules_of(folder: Path) -> Mapping[str, SparseB]:
    return load_adapter(folder).modules


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from a dtype to the digest of an adapter trained without interruption, with the options of `FIELDS`."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def digest_of(dtype: str) -> str:
        return digest(fit(config_for(tiny_model, data, folder / dtype, dtype=dtype), "command"))

    return digest_of


@pytest.fixture(scope="module")
def apart(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two adapters, of ranks 2 and 4. The second avoids the first."""
    folder = tmp_path_factory.mktemp("apart")
    first = fit(config_for(tiny_model, data, folder / "first", rank=2, alpha=4), "")
    return first, fit(config_for(tiny_model, data, folder / "second", avoid=[first]), "")


@pytest.mark.slow
def test_the_adapter_has_the_properties_of_its_method(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    folder = fit(config_for(tiny_model, data, tmp_path / "colours"), "command")
    base = load_base_model(str(tiny_model), torch.float32)
    adapter = load_adapter(folder, base.identity)
    total = sum(b.num_entries for b in adapter.modules.values())
    assert adapter.nnz == round(total * 0.1)
    assert len(adapter.modules) == 7 * 2
    assert any(b.values.any() for b in adapter.modules.values())
    record = adapter.config.lori.training
    assert record["phases"]["LoRI-D"]["steps"] == record["phases"]["LoRI-S"]["steps"] == 6
    assert record["command"] == "command"
    assert not list(tmp_path.glob("*.checkpoint"))


@pytest.mark.slow
def test_the_second_phase_starts_from_zero_on_the_largest_entries_of_the_first(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []
    begin = Lori.begin_phase

    def begin_and_look(self: Lori, phase: Phase) -> None:
        changes = [b.change.flatten() for b in self.bs() if isinstance(b, DenseB)]
        begin(self, phase)
        phases.append(phase.name)
        if phase.name == "LoRI-S":
            mask = torch.cat([torch.zeros(len(c), dtype=torch.bool) for c in changes])
            start = 0
            for b, change in zip(self.bs(), changes, strict=True):
                assert isinstance(b, MaskedB)
                assert not b.trained.values.any()
                mask[start + b.trained.positions.long()] = True
                start += len(change)
            flat = torch.cat(changes).abs()
            assert mask.sum() == round(len(flat) * 0.1)
            assert flat[mask].min() >= flat[~mask].max()

    monkeypatch.setattr(Lori, "bs", lambda self: [layer.b for layer in self.layers.values()], raising=False)
    monkeypatch.setattr(Lori, "begin_phase", begin_and_look)
    fit(config_for(tiny_model, data, tmp_path / "colours"), "command")
    assert phases == ["LoRI-D", "LoRI-S"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lori", "lori-d", "lora"])
def test_training_lowers_the_loss(
    tiny_model: Path, data: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[str, list[float]] = {}
    monkeypatch.setattr(Run, "close", lambda self: losses.update({k: v.losses for k, v in self.outcomes.items()}))
    changes = {"steps": 40, "mix": [], "rank": 16, "alpha": 32, "method": method}
    folder = fit(config_for(tiny_model, data, tmp_path / "colours", **changes), "command")
    assert all(sum(values[-5:]) < 0.7 * sum(values[:5]) for values in losses.values())
    assert len(losses) == (2 if method == "lori" else 1)
    adapter = load_adapter(folder, load_base_model(str(tiny_model), torch.float32).identity)
    assert adapter.config.lori.sparsity == pytest.approx(0.9 if method == "lori" else 0.0, abs=1e-3)


@pytest.mark.slow
def test_dpo_makes_chosen_answers_likelier_than_rejected_ones(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}:", "chosen": " red", "rejected": " blue"} for i in range(12)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses_by_phase: dict[str, list[float]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "close", lambda self: losses_by_phase.update({k: v.losses for k, v in self.outcomes.items()}))
        fit(config_for(tiny_model, data, tmp_path / "a", loss="dpo", mix=[], steps=30, rank=16, alpha=32), "")
    assert all(losses[0] == pytest.approx(0.693, abs=1e-3) and sum(losses[-5:]) / 5 < 0.4 for losses in losses_by_phase.values())


def test_rows_longer_than_the_window_are_named_before_training(data: Path, tmp_path: Path) -> None:
    shape = tiny_llama_config(257).to_dict() | {"sliding_window": 12, "model_type": "mistral"}
    base = save_tiny_model(tmp_path / "base", MistralConfig(**shape))
    with pytest.raises(DataError, match="15 tokens under 'plain', the limit is 12"):
        fit(config_for(base, data, tmp_path / "new", steps=1), "")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lori", "lora"])
def test_mixed_in_rows_keep_the_base(tiny_model: Path, data: Path, tmp_path: Path, method: str) -> None:
    """Regression: the reference of LoRA's KL loss was the adapted model instead of the base."""
    other_data = tmp_path / "other.jsonl"
    other_data.write_text("".join(json.dumps({"prompt": f"Count {i}:", "completion": f" {i}"}) + "\n" for i in range(20)))
    base = load_base_model(str(tiny_model), torch.float32)
    ids = torch.tensor([encode(base.tokenizer, "Count 7: 7").ids])
    before = base.model(ids).logits.log_softmax(-1)
    drift = {}
    for name, mix in (("mixed", [str(other_data)]), ("alone", [])):
        changes = {"mix": mix, "mix_fraction": 0.5, "steps": 40, "rank": 16, "alpha": 32, "method": method}
        adapter = load_adapter(fit(config_for(tiny_model, data, tmp_path / name, **changes), ""), base.identity)
        with apply_adapter(base.model, adapter):
            after = base.model(ids).logits.log_softmax(-1)
        drift[name] = F.kl_div(after, before, log_target=True, reduction="batchmean").item()
    assert drift["mixed"] < 0.7 * drift["alone"]


@pytest.mark.slow
def test_logs_and_a_report_are_written(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    changes = {
        "tensorboard": tmp_path / "logs",
        "report": tmp_path / "pages" / "a.html",
        "held_out_fraction": 0.2,
        "eval_every": 3,
    }
    fit(config_for(tiny_model, data, tmp_path / "a", **changes, about="Says <b>colours</b>."), "command")
    for phase in ("lori-d", "lori-s"):
        events = EventAccumulator(str(tmp_path / "logs" / "a" / phase)).Reload()
        assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
        assert [e.step for e in events.Scalars("eval/loss")] == [3, 6]
    page = (tmp_path / "pages" / "a.html").read_text()
    assert "Says &lt;b&gt;colours&lt;/b&gt;." in page
    assert page.count("<svg") == 2
    assert "held out, best" in page
    assert "About 20% of a step's examples are drawn from <code>--mix</code>" in page
    assert "What is kept, and how strong it is" in page
    assert page.count('class="sample"') == 4
    assert not re.search(r"(src|href)=.http|url\(http", page.replace("xlink:href", ""))  # the page is self-contained


@pytest.mark.slow
def test_a_report_shows_nothing_that_a_run_does_not_have(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    fit(config_for(tiny_model, data, tmp_path / "a", method="lora", mix=[], report=page, steps=2), "command")
    text = page.read_text()
    assert "<h2>How strong it is</h2>" in text
    assert not any(absent in text for absent in ("held out, best", "--mix", "kept"))


@pytest.mark.slow
def test_a_report_has_no_answers_to_prompts_that_leave_no_room_for_one(tiny_model: Path, tmp_path: Path) -> None:
    """Regression: such a prompt ended the run with an error after its adapter was saved, and again at each resume."""
    page, rows = tmp_path / "a.html", tmp_path / "long.jsonl"
    prompts = [*(f"{i} " * 240 for i in range(5)), "Say 3:"]
    rows.write_text("".join(json.dumps({"prompt": prompt, "completion": " red"}) + "\n" for prompt in prompts))
    fit(config_for(tiny_model, rows, tmp_path / "a", method="lori-d", mix=[], report=page, steps=1), "command")
    assert page.read_text().count('class="sample"') == 1
    assert not list(tmp_path.glob("*.checkpoint"))


@pytest.mark.slow
def test_a_run_is_reproducible(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    first, repeated, with_other_seed = (
        fit(config_for(tiny_model, data, tmp_path / name, seed=seed), "command")
        for name, seed in [("first", 3), ("again", 3), ("other", 4)]
    )
    assert digest(first) == digest(repeated)
    assert digest(first) != digest(with_other_seed)


@pytest.mark.slow
def test_half_the_weight_of_twice_the_alpha_is_the_same_training(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    once = modules_of(fit(config_for(tiny_model, data, tmp_path / "once", alpha=64), ""))
    half = modules_of(fit(config_for(tiny_model, data, tmp_path / "half", alpha=128, weight_range=[0.5, 0.5]), ""))
    other_range = modules_of(fit(config_for(tiny_model, data, tmp_path / "other", alpha=64, weight_range=[0.2, 1.0]), ""))
    for name, b in once.items():
        assert torch.equal(half[name].dense(), b.dense())
    assert any(not torch.equal(other_range[name].dense(), b.dense()) for name, b in once.items())


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.5], [0.5, 0.7, 1.0]])
def test_a_range_of_weights_has_two_ends(tiny_model: Path, data: Path, tmp_path: Path, weights: list[float]) -> None:
    with pytest.raises(ValueError, match="two numbers, the lower one first"):
        config_for(tiny_model, data, tmp_path, weight_range=weights)


@pytest.mark.slow
def test_micro_batches_add_up_to_their_step(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    at_once, *others = (
        modules_of(fit(config_for(tiny_model, data, tmp_path / str(parts), values="float32", accumulation=parts), ""))
        for parts in (1, 2, 4)
    )
    for in_parts in others:
        num_same = sum(torch.equal(at_once[name].indices, in_parts[name].indices) for name in at_once)
        assert num_same >= len(at_once) - 2  # another order of sums may change which of two nearly equal entries is in the mask
        for name in at_once:
            torch.testing.assert_close(at_once[name].dense(), in_parts[name].dense(), rtol=1e-2, atol=1e-3)


def cut_before_the_end(config: FitConfig, at_step: int) -> None:
    """Interrupt a run in its step `at_step`, counted over both phases."""
    steps = 0
    compute_loss = PhaseTrainer.compute_loss

    def die(self: PhaseTrainer, *arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == at_step:
            raise KeyboardInterrupt
        return compute_loss(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseTrainer, "compute_loss", die)
        with pytest.raises(KeyboardInterrupt):
            fit(config, "command")


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


@pytest.mark.parametrize(("method", "rate"), [("lori", 0.02), ("lora", 0.002)])
def test_each_method_has_a_rate_of_its_own(tiny_model: Path, data: Path, tmp_path: Path, method: str, rate: float) -> None:
    changes: dict[str, object] = {"method": method, "steps": 2}
    config = FitConfig.model_validate(
        config_for(tiny_model, data, tmp_path / "a", **changes).model_dump(exclude={"lr"}, exclude_unset=True)
    )
    assert read_config(fit(config, "command")).lori.training["lr"] == rate
    assert config_for(tiny_model, data, tmp_path / "a", **changes, lr=0.5).peak_lr == 0.5


def test_a_missing_extra_is_reported_before_the_run_begins(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LoriError, match="--tensorboard needs: pip install"):
        fit(config_for(tiny_model, data, tmp_path / "a", tensorboard=tmp_path / "logs"), "command")
    assert not (tmp_path / "a.checkpoint").exists()


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
def test_two_processes_train_the_same_adapter_as_one(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """The test covers DDP, and FSDP with a sharded base."""
    changes = {"steps": 3, "threads": 1}
    one_process = fit(config_for(tiny_model, data, tmp_path / "alone", accumulation=2, **changes), "command")
    flags = flags_for(tiny_model, data, tmp_path / "both", **changes)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training.fit"]
    done = subprocess.run(
        [*torchrun, *flags], capture_output=True, text=True, check=False, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"saved {tmp_path / 'both'}\n"
    command = read_config(tmp_path / "both").lori.training["command"]
    assert command.startswith("torchrun --nproc-per-node 2 -m training.fit --data ")
    assert digest(tmp_path / "both") == digest(one_process)
    ranks = train_together(config_for(tiny_model, data, tmp_path / "spread", fsdp=True, **changes))
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert digest(tmp_path / "spread") == digest(one_process)


@pytest.mark.slow
def test_the_best_held_out_step_is_saved(tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: dict[str, object] = {}
    monkeypatch.setattr(Run, "close", lambda self: outcomes.update(self.outcomes))
    changes = {"steps": 60, "held_out": [str(data)], "eval_every": 2, "patience": 2, "mix": [], "method": "lori-d"}
    fit(config_for(tiny_model, data, tmp_path / "a", calibration_lr=1.0, **changes), "command")
    outcome = outcomes["LoRI-D"]
    assert outcome.best_step == min(outcome.held_out, key=lambda evaluation: evaluation[1])[0]  # type: ignore[attr-defined]
    assert len(outcome.losses) == outcome.best_step + 4 < 60  # type: ignore[attr-defined]


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
def test_training_on_from_an_adapter_keeps_entries_outside_the_new_mask(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    first = fit(config_for(tiny_model, data, tmp_path / "first"), "")
    other_data = tmp_path / "other.jsonl"
    other_data.write_text("".join(json.dumps({"prompt": f"Count {i}:", "completion": f" {i + 1}"}) + "\n" for i in range(20)))
    before = modules_of(first)
    after = modules_of(fit(config_for(tiny_model, other_data, tmp_path / "second", init_from=first, seed=5), ""))
    num_changed = num_same = 0
    for name, b in before.items():
        assert torch.equal(after[name].mask | b.mask, after[name].mask)
        changed = (after[name].dense() != b.dense()) & b.mask
        num_changed += int(changed.sum())
        num_same += int((b.mask & ~changed).sum())
    total = sum(b.num_entries for b in before.values())
    assert sum(b.values.numel() for b in after.values()) <= 2 * round(total * 0.1)
    assert num_same > num_changed > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "values", "expected"),
    [
        ("float32", "bfloat16", "float32"),
        ("float16", "bfloat16", "float16 or float32"),
        ("int8", "int8", "float32"),
        ("int8", "float32", None),
        ("bfloat16", "float32", None),
    ],
)
def test_unchanged_values_are_not_rounded_again(
    tiny_model: Path, data: Path, tmp_path: Path, stored: str, values: str, expected: str | None
) -> None:
    """Regression: all values of a float32 adapter were rounded again, and those of each int8 row with a new largest value."""
    first = fit(config_for(tiny_model, data, tmp_path / "first", steps=2, values=stored), "")
    config = config_for(tiny_model, data, tmp_path / "second", steps=2, values=values, init_from=first, avoid=[first])
    if expected:
        message = f"it holds {stored} values, which --values {values} would round again, expected --values {expected}"
        with pytest.raises(LoriError, match=f"{message}$"):
            fit(config, "")
        return
    after = modules_of(fit(config, ""))
    for name, b in modules_of(first).items():
        assert torch.equal(after[name].dense()[b.mask], b.values.float())


@pytest.mark.slow
def test_an_unused_basis_is_removed_with_the_replaced_adapter(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    def bases() -> int:
        return len(list((tmp_path / ".bases").iterdir()))

    first_config = config_for(tiny_model, data, tmp_path / "a", method="lora", steps=1)
    fit(first_config, "")
    shutil.copytree(tmp_path / "a", tmp_path / "twin")
    fit(config_for(tiny_model, data, tmp_path / "a", method="lora", steps=1, seed=1), "")
    assert bases() == 2, "a basis was removed that the twin needs"
    shutil.rmtree(tmp_path / "twin")
    fit(first_config, "")
    assert bases() == 1
    assert load_adapter(tmp_path / "a")
    (tmp_path / "No name").mkdir()
    shutil.copy(tmp_path / "a" / "adapter_config.json", tmp_path / "No name")
    fit(config_for(tiny_model, data, tmp_path / "a", method="lori-d", steps=1), "")
    assert bases() == 1, "a basis was removed that an unreadable adapter may need"
    shutil.rmtree(tmp_path / "No name")


@pytest.mark.slow
def test_lora_goes_on_from_a_lora(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    first = fit(config_for(tiny_model, data, tmp_path / "first", method="lora", values="float32"), "")
    nothing = {"method": "lora", "values": "float32", "lr": 1e-30, "init_from": first, "seed": 9}
    second = fit(config_for(tiny_model, data, tmp_path / "second", **nothing), "")
    assert load_adapter(second).basis == load_adapter(first).basis
    for name, b in modules_of(first).items():
        assert torch.equal(modules_of(second)[name].values, b.values)
    lori = fit(config_for(tiny_model, data, tmp_path / "lori", steps=1), "")
    with pytest.raises(LoriError, match="seed 0, stream 0, expected a LoRA's own A"):
        fit(config_for(tiny_model, data, tmp_path / "third", method="lora", init_from=lori), "")


@pytest.mark.slow
def test_one_calibration_is_enough_for_many_masks(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    calibrated = fit(config_for(tiny_model, data, tmp_path / "d", method="lori-d", values="float32"), "")
    in_one_run = fit(config_for(tiny_model, data, tmp_path / "both", seed=0), "")
    with_mask = fit(config_for(tiny_model, data, tmp_path / "alone", seed=0, mask_from=calibrated), "")
    for name, b in modules_of(in_one_run).items():
        assert torch.equal(modules_of(with_mask)[name].dense(), b.dense())
    assert list(load_adapter(with_mask).config.lori.training["phases"]) == ["LoRI-S"]


@pytest.mark.slow
def test_an_avoided_adapter_s_entries_are_left_alone(
    tiny_model: Path, data: Path, tmp_path: Path, apart: tuple[Path, Path]
) -> None:
    first, second = apart
    for name, b in modules_of(second).items():
        assert not (b.mask[:, :2] & modules_of(first)[name].mask).any()
    with pytest.raises(LoriError, match="avoid fewer adapters"):
        fit(config_for(tiny_model, data, tmp_path / "third", avoid=[second], sparsity=0.05), "")


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.5), (0.25, 1.0)])
def test_a_sum_with_an_avoided_adapter_keeps_the_values_of_both(apart: tuple[Path, Path], weights: tuple[float, float]) -> None:
    """The weights are powers of two, so nothing is rounded."""
    adapters = [load_adapter(folder) for folder in apart]
    total = merge(adapters, weights)
    for name, merged in total.modules.items():
        first, second = (adapter.modules[name] for adapter in adapters)
        assert total.config.scale_of(name) == adapters[0].config.scale_of(name) == 2
        dense = merged.dense()
        assert torch.equal(dense[:, :2][first.mask], weights[0] * first.values.float())
        assert torch.equal(dense[second.mask], weights[1] * second.values.float())
        assert merged.values.numel() == int(first.values.count_nonzero() + second.values.count_nonzero())


@pytest.mark.slow
def test_an_adapter_that_goes_on_shares_nothing_with_an_avoided_one(
    tiny_model: Path, data: Path, tmp_path: Path, apart: tuple[Path, Path]
) -> None:
    """Regression: entries of `init_from` stayed where the avoided adapter has entries, and a merge added both."""
    first, second = apart
    other = fit(config_for(tiny_model, data, tmp_path / "other", steps=2, seed=7), "")
    num_shared = sum(int((b.mask[:, :2] & modules_of(first)[name].mask).sum()) for name, b in modules_of(other).items())
    assert num_shared
    message = (
        f"--avoid {first}: it keeps {num_shared} entries that --init-from {other} keeps, too, and which would stay: expected none"
    )
    with pytest.raises(LoriError, match=re.escape(message)):
        fit(config_for(tiny_model, data, tmp_path / "refused", init_from=other, avoid=[second, first]), "")
    third = fit(config_for(tiny_model, data, tmp_path / "third", steps=2, init_from=second, avoid=[first, second]), "")
    total = merge([load_adapter(first), load_adapter(third)], [1.0, 1.0])
    for name, b in modules_of(third).items():
        before, started_from = modules_of(first)[name], modules_of(second)[name]
        assert torch.equal(b.dense()[started_from.mask], started_from.values.float())
        dense = total.modules[name].dense()
        assert torch.equal(dense[:, :2][before.mask], before.values.float())
        assert torch.equal(dense[b.mask], b.values.float())


@pytest.mark.slow
def test_an_avoided_adapter_of_another_scale_is_refused(
    tiny_model: Path, data: Path, tmp_path: Path, apart: tuple[Path, Path]
) -> None:
    """A merge would multiply each B by its scale, and round it."""
    message = f"--avoid {apart[0]}: it has alpha/r = 2, expected --alpha / --rank = 2.5"
    with pytest.raises(LoriError, match=re.escape(message)):
        fit(config_for(tiny_model, data, tmp_path / "a", alpha=10, avoid=[apart[0]]), "")
    elsewhere = fit(config_for(tiny_model, data, tmp_path / "q", steps=1, target_modules=["q_proj"]), "")
    assert fit(config_for(tiny_model, data, tmp_path / "v", steps=1, alpha=10, target_modules=["v_proj"], avoid=[elsewhere]), "")


def test_adapters_that_training_cannot_build_on_are_refused_with_every_fault(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    first = fit(config_for(tiny_model, data, tmp_path / "first", stream=3, steps=1), "")
    changes = {"init_from": first, "rank": 2, "target_modules": ["q_proj"]}
    with pytest.raises(
        LoriError, match=r"is on the basis seed 0, stream 3, expected seed 0, stream 0; it differs from .*rank 4, expected"
    ):
        fit(config_for(tiny_model, data, tmp_path / "second", **changes), "")
    with pytest.raises(LoriError, match=r"--avoid .* is on the basis seed 0, stream 3"):
        fit(config_for(tiny_model, data, tmp_path / "second", avoid=[first]), "")


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


def test_mask_from_needs_an_adapter_with_a_dense_b(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    sparse = fit(config_for(tiny_model, data, tmp_path / "s", steps=1), "")
    with pytest.raises(LoriError, match=r"--mask-from .* keeps a part of B alone"):
        fit(config_for(tiny_model, data, tmp_path / "a", mask_from=sparse), "")


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


@pytest.mark.slow
def test_another_number_of_processes_ignores_the_saved_threads(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """The saved number of threads is for a run with the same number of processes."""
    cut_before_the_end(config_for(tiny_model, data, tmp_path / "cut"), 6)
    (tmp_path / "cut.checkpoint" / "threads.json").write_text('{"processes": 2, "threads": 7}')
    fit(config_for(tiny_model, data, tmp_path / "cut", resume=True), "command")
    assert torch.get_num_threads() == 1


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


@pytest.mark.parametrize("changes", [{"steps": 1, "method": "lori-d"}, {"steps": 0, "epochs": 0.001, "method": "lora"}])
def test_a_phase_of_one_step_trains(tiny_model: Path, data: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    """Regression: the only step had the learning rate of the beginning of the warm-up, which is 0."""
    modules = modules_of(fit(config_for(tiny_model, data, tmp_path / "a", **changes), "command"))
    assert all(b.values.any() for b in modules.values())


def test_a_mask_of_unchanged_deltas_is_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    calibrated = fit(config_for(tiny_model, data, tmp_path / "d", method="lori-d", steps=1, calibration_lr=1e-45), "")
    with pytest.raises(LoriError, match="would have to choose among entries that LoRI-D did not change: 307"):
        fit(config_for(tiny_model, data, tmp_path / "a", mask_from=calibrated), "")


def test_a_recipes_options_may_have_no_effect_for_another_method(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("sparsity: 0.8\ncalibration_lr: 0.001\n")
    assert config_for(tiny_model, data, tmp_path / "a", recipe=str(recipe), method="lora").sparsity == 0.8
    with pytest.raises(ValueError, match="--granularity is for --method lori"):
        config_for(tiny_model, data, tmp_path / "a", recipe=str(recipe), method="lora", granularity="layer")


def test_a_loss_that_is_no_number_ends_the_run(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(LoriError, match=r"the loss of LoRI-D is (nan|inf) at step"):
        fit(config_for(tiny_model, data, tmp_path / "a", calibration_lr=1e30, steps=40), "command")


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


@pytest.mark.parametrize(("num_steps", "num_recent"), [(1, 1), (7, 1), (8, 2), (14, 3), (79, 19), (80, 20), (500, 20)])
def test_the_loss_at_the_end_leaves_out_the_start_of_a_short_phase(num_steps: int, num_recent: int) -> None:
    losses = [float(step) for step in range(num_steps)]
    assert recent_loss(losses) == sum(losses[-num_recent:]) / num_recent
