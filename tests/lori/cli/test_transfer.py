"""Adapters that come and go by `python -m lori`: import, export, pack, unpack."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lori.format import WEIGHTS_FILE, load_adapter, save_adapter
from lori.prompt_statistics import STATISTICS_FILE
from lori.store.entry import Entry
from lori.store.store import AdapterStore
from tests.lori.adapters import write_statistics
from tests.lori.cli.conftest import Run


def test_an_adapter_goes_to_peft_and_comes_back(run: Run, tmp_path: Path, tiny_adapter: tuple[Path, Path]) -> None:
    model, folder = tiny_adapter
    assert run("export", folder, tmp_path / "peft")[0] == 0
    code, out, err = run("import", tmp_path / "peft", tmp_path / "in", "--model", model, "--values", "bfloat16")
    assert (code, err) == (0, "")
    assert "published peft@" in out
    back, before = load_adapter(AdapterStore(tmp_path / "in").find("peft").folder), load_adapter(folder)
    assert all(torch.equal(back.modules[name].values, b.values) for name, b in before.modules.items())


def test_a_dense_lora_is_pruned_only_where_asked(run: Run, tmp_path: Path, tiny_adapter: tuple[Path, Path]) -> None:
    model, folder = tiny_adapter
    run("export", folder, tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / WEIGHTS_FILE)
    save_file({k: v + 0.01 if "lora_B" in k else v for k, v in tensors.items()}, tmp_path / "peft" / WEIGHTS_FILE)
    code, out, err = run("import", tmp_path / "peft", tmp_path / "in", "--model", model, "--name", "whole")
    assert code == 0
    assert "100.0% of its B is kept" in err
    code, out, err = run("import", tmp_path / "peft", tmp_path / "in", "--model", model, "--name", "part", "--sparsity", 0.9)
    assert (code, err) == (0, "")
    assert "pruning error: " in out
    assert load_adapter(AdapterStore(tmp_path / "in").find("part").folder).config.lori.sparsity == pytest.approx(0.9, abs=0.01)


def test_an_adapter_in_the_native_format_is_imported_unchanged(run: Run, store: Path, tmp_path: Path) -> None:
    assert run("import", store / "math", tmp_path / "in", "--name", "sums")[0] == 0
    assert AdapterStore(tmp_path / "in").find("sums").version == AdapterStore(store).find("math").version
    assert run("import", store / "math", tmp_path / "in", "--sparsity", 0.9)[0] == 2


def test_statistics_come_along_unless_they_are_of_another_version(run: Run, store: Path, tmp_path: Path) -> None:
    statistics = write_statistics(store / "math")
    assert run("import", store / "math", tmp_path / "in")[::2] == (0, "")
    assert (AdapterStore(tmp_path / "in").find("math").folder / STATISTICS_FILE).read_bytes() == statistics
    assert run("pack", store / "math", tmp_path / "math.lori")[::2] == (0, "")
    assert run("unpack", tmp_path / "math.lori", tmp_path / "out")[::2] == (0, "")
    assert (AdapterStore(tmp_path / "out").find("math").folder / STATISTICS_FILE).read_bytes() == statistics
    version = Entry("math", store / "math").version
    err = run("pack", store / "math", tmp_path / "small.lori", "--values", "int8")[2]
    assert f"warning: {STATISTICS_FILE} belongs to {version}, and was not packed: run python -m training.calibrate again" in err
    write_statistics(store / "math", "0" * 64)
    code, _, err = run("import", store / "math", tmp_path / "in")
    assert code == 1
    assert f"{STATISTICS_FILE}: belongs to the version 000000000000, expected {version}" in err


@pytest.mark.parametrize("source", ["none", "hf://no-such"])
def test_a_missing_source_is_an_error(run: Run, tmp_path: Path, source: str) -> None:
    code, _, err = run("import", source, tmp_path / "in")
    assert code == 1
    assert source in err


def test_pack_and_unpack(run: Run, store: Path, tmp_path: Path) -> None:
    code, out, _ = run("pack", store / "math", tmp_path / "math.lori", "--values", "int8")
    assert code == 0
    assert "rounding error: 0." in out
    assert run("unpack", tmp_path / "math.lori", tmp_path / "in")[0] == 0
    assert load_adapter(AdapterStore(tmp_path / "in").find("math").folder).config.lori.values == "int8"
    (tmp_path / "math.lori").write_text("x")
    assert run("unpack", tmp_path / "math.lori", tmp_path / "in")[0] == 1


# --- regressions


def test_templates_survive_export_and_import(run: Run, tmp_path: Path, tiny_adapter: tuple[Path, Path]) -> None:
    # Regression: an import silently assumed `chat`, whatever the adapter was trained on.
    model, folder = tiny_adapter
    plain = load_adapter(folder)
    section = plain.config.lori.model_copy(update={"templates": ("plain", "chat")})
    save_adapter(replace(plain, config=plain.config.model_copy(update={"lori": section})), tmp_path / "plain")
    run("export", tmp_path / "plain", tmp_path / "peft")
    assert "templates: plain, chat" in run("import", tmp_path / "peft", tmp_path / "in", "--model", model)[1]
    assert AdapterStore(tmp_path / "in").find("peft").load().config.lori.templates == ("plain", "chat")
    run("import", tmp_path / "peft", tmp_path / "in", "--model", model, "--template", "chat", "--name", "other")
    imported = AdapterStore(tmp_path / "in")
    assert imported.find("other").load().config.lori.templates == ("chat",)
    assert imported.find("other").version != imported.find("peft").version


def test_the_record_of_a_merge_survives_the_import_of_an_equal_adapter(
    run: Run, tmp_path: Path, tiny_adapter: tuple[Path, Path]
) -> None:
    # Regression: an equal adapter, imported under the merge's name, replaced the merge's record.
    model, folder = tiny_adapter
    run("merge", folder, folder, "-w", 1, "-w", 1, "-o", tmp_path / "in/both", "--values", "float32")
    before = AdapterStore(tmp_path / "in").find("both")
    assert "merged by linear: 2 tiny@" in run("inspect", tmp_path / "in/both")[1]
    run("export", tmp_path / "in/both", tmp_path / "peft")
    run("import", tmp_path / "peft", tmp_path / "in", "--model", model, "--name", "both")
    assert AdapterStore(tmp_path / "in").find("both").folder == before.folder
    assert "merged by linear: 2 tiny@" in run("inspect", tmp_path / "in/both")[1]


def test_an_adapter_goes_from_store_to_store_by_name(run: Run, store: Path, tmp_path: Path) -> None:
    AdapterStore(store).publish(store / "math")
    assert run("import", store / "math", tmp_path / "in")[0] == 0
    assert AdapterStore(tmp_path / "in").find("math").version == AdapterStore(store).find("math").version


def test_a_source_without_a_valid_name_needs_the_name_option(run: Run, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store / "math", tmp_path / "My LoRA")
    code, _, err = run("import", tmp_path / "My LoRA", tmp_path / "in")
    assert code == 2
    assert "--name" in err
