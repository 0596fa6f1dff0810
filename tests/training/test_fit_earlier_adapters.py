"""Earlier adapters that a training run goes on from, takes its mask from, or avoids."""

import json
import re
from pathlib import Path

import pytest
import torch

from lori.errors import LoriError
from lori.format import load_adapter
from lori.merge import merge
from tests.training.runs import config_for, modules_of
from training.fit import fit


@pytest.fixture(scope="module")
def apart(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two adapters, of ranks 2 and 4. The second avoids the first."""
    folder = tmp_path_factory.mktemp("apart")
    first = fit(config_for(tiny_model, data, folder / "first", rank=2, alpha=4), "")
    return first, fit(config_for(tiny_model, data, folder / "second", avoid=[first]), "")


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


def test_mask_from_needs_an_adapter_with_a_dense_b(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    sparse = fit(config_for(tiny_model, data, tmp_path / "s", steps=1), "")
    with pytest.raises(LoriError, match=r"--mask-from .* keeps a part of B alone"):
        fit(config_for(tiny_model, data, tmp_path / "a", mask_from=sparse), "")


def test_a_mask_of_unchanged_deltas_is_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    calibrated = fit(config_for(tiny_model, data, tmp_path / "d", method="lori-d", steps=1, calibration_lr=1e-45), "")
    with pytest.raises(LoriError, match="would have to choose among entries that LoRI-D did not change: 307"):
        fit(config_for(tiny_model, data, tmp_path / "a", mask_from=calibrated), "")
