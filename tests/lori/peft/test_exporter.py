"""Exported folders in PEFT's format: names, fields and dense matrices."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.config import CONFIG_FILE
from lori.errors import AdapterError
from lori.format import WEIGHTS_FILE
from lori.peft.exporter import export_peft
from lori.peft.importer import import_peft
from lori.sparse import SparseB
from tests.lori.adapters import BASE, SHAPES, make_adapter, make_config

Q, UP = "layers.0.q_proj", "layers.1.up_proj"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text())


def test_tensors_have_the_names_and_values_that_peft_expects(tmp_path: Path) -> None:
    adapter = make_adapter("math")
    tensors = load_file(export_peft(adapter, tmp_path / "out") / WEIGHTS_FILE)
    assert len(tensors) == 2 * len(adapter.modules)
    for module, b in adapter.modules.items():
        a = tensors[f"base_model.model.{module}.lora_A.weight"]
        assert torch.equal(a, adapter.basis.draw(module, b.shape[1], SHAPES[module][1]))
        assert torch.equal(tensors[f"base_model.model.{module}.lora_B.weight"], b.dense())


def test_the_config_is_one_that_peft_reads(tmp_path: Path) -> None:
    folder = export_peft(make_adapter("math", alpha=6.0), tmp_path / "out")
    config = LoraConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 6, {"q_proj", "up_proj"})
    assert (config.bias, config.use_rslora, config.use_dora, config.inference_mode) == ("none", False, False, True)
    assert (config.task_type, config.base_model_name_or_path) == ("CAUSAL_LM", "a/base")
    assert isinstance(config_of(folder)["lora_alpha"], int)


def test_an_alpha_that_is_no_integer_is_kept(tmp_path: Path) -> None:
    assert config_of(export_peft(make_adapter("math", alpha=4.5), tmp_path / "out"))["lora_alpha"] == 4.5


def test_patterns_name_one_module_each(tmp_path: Path) -> None:
    adapter = make_adapter("math")
    config = adapter.config.model_copy(update={"alpha_pattern": {Q: 2.0}, "target_modules": tuple(adapter.modules)})
    exported = config_of(export_peft(replace(adapter, config=config), tmp_path / "out"))
    assert exported["alpha_pattern"] == {r"^layers\.0\.q_proj": 2}
    assert exported["rank_pattern"] == {}
    assert exported["target_modules"] == list(adapter.modules)


def test_modules_of_another_rank_have_an_a_of_that_rank(tmp_path: Path) -> None:
    adapter = make_adapter("math")
    wide = SparseB((9, 5), torch.tensor([0, 7], dtype=torch.int32), torch.tensor([1.0, 2.0]))
    config = adapter.config.model_copy(update={"rank_pattern": {Q: 5}})
    folder = export_peft(replace(adapter, config=config, modules={**adapter.modules, Q: wide}), tmp_path / "out")
    tensors = load_file(folder / WEIGHTS_FILE)
    assert torch.equal(tensors[f"base_model.model.{Q}.lora_A.weight"], adapter.basis.draw(Q, 5, 5))
    assert tensors[f"base_model.model.{Q}.lora_B.weight"].shape == (9, 5)
    assert config_of(folder)["rank_pattern"] == {r"^layers\.0\.q_proj": 5}


def test_an_explicit_basis_is_written_as_it_is(tmp_path: Path) -> None:
    adapter = make_adapter("math")
    basis = Explicit.from_tensors({module: torch.randn(3, SHAPES[module][1], dtype=torch.bfloat16) for module in adapter.modules})
    tensors = load_file(export_peft(replace(adapter, basis=basis), tmp_path / "out") / WEIGHTS_FILE)
    for module, a in basis.tensors.items():
        assert torch.equal(tensors[f"base_model.model.{module}.lora_A.weight"], a.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_smaller_dtype_rounds_both_matrices(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = make_adapter("math")
    tensors = load_file(export_peft(adapter, tmp_path / "out", dtype) / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    a = adapter.basis.draw(UP, 3, 7)
    assert torch.equal(tensors[f"base_model.model.{UP}.lora_A.weight"], a.to(dtype))
    assert torch.equal(tensors[f"base_model.model.{UP}.lora_B.weight"], adapter.modules[UP].dense().to(dtype))
    assert not torch.equal(a.to(dtype).float(), a)


def test_values_that_overflow_the_dtype_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    large = SparseB((9, 3), torch.tensor([4], dtype=torch.int32), torch.tensor([1e5]))
    adapter = make_adapter("math")
    adapter = Adapter("math", make_config(), {**adapter.modules, Q: large}, adapter.basis)
    with pytest.raises(AdapterError, match=rf"float16 cannot hold values of base_model\.model\.{Q}\.lora_B"):
        export_peft(adapter, tmp_path / "out", torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["empty folder", "file", "broken link"])
def test_an_existing_target_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "empty folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="is there already"):
        export_peft(make_adapter("math"), target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_comes_back_on_the_shared_basis(tmp_path: Path) -> None:
    adapter = make_adapter("math", basis=Seeded())
    back = import_peft(export_peft(adapter, tmp_path / "peft"), BASE, name="math").adapter
    assert back.basis == Seeded()
    assert back.config.lori.basis_digest == adapter.config.lori.basis_digest
    other = import_peft(export_peft(make_adapter("law", basis=Seeded(1)), tmp_path / "other"), BASE, name="law").adapter
    assert isinstance(other.basis, Explicit)
    rounded = import_peft(export_peft(adapter, tmp_path / "half", torch.bfloat16), BASE, name="math").adapter
    assert isinstance(rounded.basis, Explicit)  # the rounded A is near the drawn one, not equal
