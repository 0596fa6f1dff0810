"""`training.fit` from the outside: the adapter that it trains, and its logs and report."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from transformers import MistralConfig

from lori.base_model import load_base_model
from lori.errors import LoriError
from lori.format import load_adapter, read_config
from lori.template import encode
from tests.tiny import save_tiny_model, tiny_llama_config
from tests.training.forked import train_together
from tests.training.runs import config_for, digest, flags_for, modules_of
from training.config import FitConfig
from training.data import DataError
from training.evaluation.local_adapters import apply_adapter
from training.fit import fit
from training.methods import Lori
from training.phase import Phase, recent_loss
from training.run import Run
from training.trainable import DenseB, MaskedB


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


@pytest.mark.parametrize(("method", "rate"), [("lori", 0.02), ("lora", 0.002)])
def test_each_method_has_a_rate_of_its_own(tiny_model: Path, data: Path, tmp_path: Path, method: str, rate: float) -> None:
    changes: dict[str, object] = {"method": method, "steps": 2}
    config = FitConfig.model_validate(
        config_for(tiny_model, data, tmp_path / "a", **changes).model_dump(exclude={"lr"}, exclude_unset=True)
    )
    assert read_config(fit(config, "command")).lori.training["lr"] == rate
    assert config_for(tiny_model, data, tmp_path / "a", **changes, lr=0.5).peak_lr == 0.5


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


@pytest.mark.parametrize("changes", [{"steps": 1, "method": "lori-d"}, {"steps": 0, "epochs": 0.001, "method": "lora"}])
def test_a_phase_of_one_step_trains(tiny_model: Path, data: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    """Regression: the only step had the learning rate of the beginning of the warm-up, which is 0."""
    modules = modules_of(fit(config_for(tiny_model, data, tmp_path / "a", **changes), "command"))
    assert all(b.values.any() for b in modules.values())


def test_a_loss_that_is_no_number_ends_the_run(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(LoriError, match=r"the loss of LoRI-D is (nan|inf) at step"):
        fit(config_for(tiny_model, data, tmp_path / "a", calibration_lr=1e30, steps=40), "command")


@pytest.mark.parametrize(("num_steps", "num_recent"), [(1, 1), (7, 1), (8, 2), (14, 3), (79, 19), (80, 20), (500, 20)])
def test_the_loss_at_the_end_leaves_out_the_start_of_a_short_phase(num_steps: int, num_recent: int) -> None:
    losses = [float(step) for step in range(num_steps)]
    assert recent_loss(losses) == sum(losses[-num_recent:]) / num_recent
