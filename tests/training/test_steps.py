"""Steps of a phase: their number, learning rates, gradient clipping and weight decay."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lori.format import load_adapter, read_config
from training.config import FitConfig
from training.fit import fit
from training.run import Run

NUM_ROWS = 30
FIELDS = {"rank": 4, "alpha": 8, "batch_size": 4, "dtype": "float32", "values": "float32", "template": ["plain"], "steps": 4}
MAX_NORM = 1e-2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{i} and 1 is", "completion": f" {i + 1}"} for i in range(NUM_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(tiny_model: Path, rows: Path, output: Path, **changes: object) -> FitConfig:
    paths = {"data": [str(rows)], "model": str(tiny_model), "output": output}
    return FitConfig.model_validate({**FIELDS, **paths, **changes})


def first_gradients(config: FitConfig, phase: str) -> list[torch.Tensor]:
    """Return each tensor's gradient in a phase's only step, from AdamW's first moment, which is a tenth of the gradient."""
    file = config.output.with_name(f"{config.output.name}.checkpoint") / phase / "checkpoint-1" / "optimizer.pt"
    states = torch.load(file, weights_only=True)["state"].values()
    return [10 * state["exp_avg"] for state in states]


def norm_of(tensors: list[torch.Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


@pytest.mark.slow
def test_gradients_are_clipped_over_all_tensors_and_parts_together(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither each tensor nor each of the two micro-batches of a step is clipped to the norm by itself."""
    monkeypatch.setattr(Run, "close", lambda _: None)  # keep the checkpoints
    changes = {"steps": 1, "save_every": 1, "accumulation": 2}
    free, clipped = (
        config_for(tiny_model, data, tmp_path / name, max_grad_norm=norm, **changes)
        for name, norm in [("free", 1e9), ("clipped", MAX_NORM)]
    )
    for config in (free, clipped):
        fit(config, "")
    before, after = (first_gradients(config, "lori-d") for config in (free, clipped))
    assert len(before) == len(after) == 7 * 2
    factor = MAX_NORM / norm_of(before)
    assert factor < 0.1
    for gradient, clipped_gradient in zip(before, after, strict=True):
        torch.testing.assert_close(clipped_gradient, factor * gradient, rtol=1e-3, atol=1e-9)
    assert norm_of(first_gradients(free, "lori-s")) > 10 * MAX_NORM
    assert norm_of(first_gradients(clipped, "lori-s")) == pytest.approx(MAX_NORM, rel=1e-3)


@pytest.mark.slow
def test_entries_outside_the_mask_do_not_decay(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """An adapter that avoids its own `init_from` leaves all of its entries out of the mask."""
    first = fit(config_for(tiny_model, data, tmp_path / "first"), "")
    plain, decayed = (
        load_adapter(
            fit(config_for(tiny_model, data, tmp_path / name, init_from=first, avoid=[first], weight_decay=decay), "")
        ).modules
        for name, decay in [("plain", 0.0), ("decayed", 20.0)]
    )
    start = load_adapter(first).modules
    new_masks = {name: decayed[name].mask & ~b.mask for name, b in start.items()}
    for name, b in start.items():
        assert torch.equal(decayed[name].dense()[b.mask], b.values)
    norms = [norm_of([modules[name].dense()[mask] for name, mask in new_masks.items()]) for modules in (decayed, plain)]
    assert 0 < norms[0] < 0.9 * norms[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "warmup", "shares"),
    [
        ("cosine", 0.25, [0, 0.5, 1, 0.93301, 0.75, 0.5, 0.25, 0.06699]),
        ("constant", 0.25, [0, 0.5, 1, 1, 1, 1, 1, 1]),
        ("constant", 0, [1] * 8),
    ],
)
def test_the_rate_follows_the_requested_schedule(
    tiny_model: Path, data: Path, tmp_path: Path, schedule: str, warmup: float, shares: list[float]
) -> None:
    changes = {"schedule": schedule, "warmup": warmup, "steps": 8, "calibration_lr": 0.01, "lr": 0.04}
    fit(config_for(tiny_model, data, tmp_path / "a", tensorboard=tmp_path / "logs", **changes), "")
    for phase, peak in {"lori-d": 0.01, "lori-s": 0.04}.items():
        events = EventAccumulator(str(tmp_path / "logs" / "a" / phase)).Reload()
        rates = [event.value for event in events.Scalars("train/learning_rate")]
        assert rates == pytest.approx([share * peak for share in shares], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "num_steps"),
    [
        ({}, (4, 4)),
        ({"calibration_steps": 2}, (2, 4)),
        ({"calibration_epochs": 0.1}, (3, 4)),
        ({"calibration_epochs": 0.1, "steps": 0, "epochs": 0.2}, (3, 6)),
        ({"calibration_epochs": 0.5, "batch_size": 4, "steps": 6}, (4, 6)),
    ],
)
def test_the_calibration_has_the_requested_length(
    tiny_model: Path, data: Path, tmp_path: Path, changes: dict[str, object], num_steps: tuple[int, int]
) -> None:
    """Half of the rows are 15 rows: three steps of 4 rows, and one of 3."""
    folder = fit(config_for(tiny_model, data, tmp_path / "a", **{"batch_size": 1, **changes}), "")
    phases = read_config(folder).lori.training["phases"]
    assert (phases["LoRI-D"]["steps"], phases["LoRI-S"]["steps"]) == num_steps
