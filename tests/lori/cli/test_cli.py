"""`python -m lori`: exit codes and output for people and scripts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lori.basis import Seeded
from lori.cli.program import app
from lori.config import CONFIG_FILE
from lori.format import WEIGHTS_FILE, load_adapter
from lori.prompt_statistics import STATISTICS_FILE
from lori.store.store import AdapterStore
from tests.lori.adapters import RANK, make_config, make_modules, save, write_statistics
from tests.lori.cli.conftest import Run


@pytest.mark.slow
def test_the_module_runs_and_its_exit_code_reports_success(store: Path) -> None:
    command = [sys.executable, "-m", "lori", "verify", str(store)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "code: sound\nlaw: sound\nmath: sound\n"
    (store / "law" / WEIGHTS_FILE).write_bytes(b"x")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "law: not sound\n  adapter_model.safetensors is not a safetensors file" in done.stdout


def test_a_wrong_command_is_2(run: Run, store: Path) -> None:
    for arguments in (["bake"], ["list"], ["list", store, "--nonsense"], ["merge", store / "math", "-o", store / "x", "-w", "a"]):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_every_command_has_help(run: Run, command: str) -> None:
    assert len(app.registered_commands) == 12
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage: python -m lori" in out


# --- list


def test_list_is_a_table_or_json(run: Run, store: Path) -> None:
    code, out, _ = run("list", store)
    assert code == 0
    for entry in AdapterStore(store).list():
        assert f"{entry.name} " in out
        assert entry.version in out
    rows = json.loads(run("list", store, "--json")[1])
    assert [row["name"] for row in rows] == ["code", "law", "math"]
    assert {row["rank"] for row in rows} == {RANK}
    assert rows[2]["bytes"] == sum(file.stat().st_size for file in (store / "math").iterdir())


def test_list_shows_unsound_adapters_and_exits_with_1(run: Run, store: Path) -> None:
    (store / "law" / CONFIG_FILE).write_text("{")
    code, out, _ = run("list", store)
    assert code == 1
    assert "adapter_config.json: JSON: Invalid JSON" in out
    assert run("list", store, "--brief")[0] == 1  # --brief reads the version from the config
    AdapterStore(store).publish(store / "math")
    (AdapterStore(store).find("math").folder / CONFIG_FILE).write_text("{")
    shutil.rmtree(store / "law")
    code, out, _ = run("list", store, "--brief")
    assert code == 0  # --brief opened no file
    assert "math" in out


def test_a_missing_store_is_an_error(run: Run, tmp_path: Path) -> None:
    code, out, err = run("list", tmp_path / "none")
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path / 'none'} is no folder of adapters: No such file or directory\n"


# --- inspect, verify


def test_inspect_shows_every_module(run: Run, store: Path) -> None:
    code, out, _ = run("inspect", store / "math")
    assert code == 0
    for name, b in make_modules(seed=0).items():
        line = next(line for line in out.splitlines() if name in line)
        assert f" {b.values.numel()} " in line
    report = json.loads(run("inspect", store / "math", "--json")[1])
    assert [row["module"] for row in report["modules"]] == list(make_modules())
    assert report["total"]["num_kept"] == sum(row["num_kept"] for row in report["modules"])
    assert report["config"]["r"] == RANK


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_inspect_draws(run: Run, store: Path, tmp_path: Path, suffix: str) -> None:
    assert run("inspect", store / "math", "--plot", tmp_path / f"x.{suffix}")[0] == 0
    assert (tmp_path / f"x.{suffix}").stat().st_size > 1000


def test_a_picture_of_an_unknown_kind_is_an_error(run: Run, store: Path, tmp_path: Path) -> None:
    code, _, err = run("inspect", store / "math", "--plot", tmp_path / "x.bmp")
    assert code == 2
    assert ".png" in err


def test_every_fault_has_a_line_of_its_own(run: Run, store: Path) -> None:
    tensors = load_file(store / "math" / WEIGHTS_FILE)
    tensors.pop("layers.0.q_proj.mask")
    save_file(tensors, store / "math" / WEIGHTS_FILE)
    code, _, err = run("inspect", store / "math")
    assert code == 1
    first, *faults = err.splitlines()
    assert first == f"error: {store / 'math'} is not a sound adapter:"
    assert len(faults) == 2
    assert all(fault.startswith("  ") for fault in faults)
    assert json.loads(run("verify", store / "math", "--json")[1])[0]["faults"]


def test_verify_reports_faults_of_statistics(run: Run, store: Path) -> None:
    write_statistics(store / "math")
    write_statistics(store / "law", "0" * 64)
    (store / "code" / WEIGHTS_FILE).write_bytes(b"x")
    (store / "code" / STATISTICS_FILE).write_bytes(b"x")
    rows = {row["adapter"]: row["faults"] for row in json.loads(run("verify", store, "--json")[1])}
    assert rows["math"] == []
    assert rows["law"][0].startswith(f"{STATISTICS_FILE}: belongs to the version 000000000000")
    assert WEIGHTS_FILE in rows["code"][0]
    assert STATISTICS_FILE in rows["code"][-1]


def test_verify_against_another_base_says_so(run: Run, store: Path, tiny_model: Path) -> None:
    code, out, _ = run("verify", store / "math", "--model", tiny_model)
    assert code == 1
    assert "expected tiny-llama (" in out


def test_an_unknown_adapter_is_an_error_with_near_names(run: Run, store: Path) -> None:
    code, _, err = run("inspect", store / "mth")
    assert (code, err) == (1, "error: there is no adapter 'mth': did you mean 'math'?\n")


# --- compare, duplicates


def test_compare_of_two_is_by_module_and_of_more_in_pairs(run: Run, store: Path, tmp_path: Path) -> None:
    code, out, _ = run("compare", store / "math", store / "law")
    assert code == 0
    assert all(name in out for name in make_modules())
    pairs = json.loads(run("compare", store / "math", store / "law", store / "code", "--json", "--plot", tmp_path / "x.png")[1])
    assert [(pair["a"], pair["b"]) for pair in pairs] == [("math", "law"), ("math", "code"), ("law", "code")]
    assert all(-1 < pair["total"]["cosine"] < 1 for pair in pairs)
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_compare_of_one_is_refused(run: Run, store: Path) -> None:
    assert run("compare", store / "math")[0] == 2
    assert run("compare", store / "math", store / "law", "-w", 1)[0] == 2


def test_compare_takes_the_weights_of_the_sum(run: Run, store: Path) -> None:
    (pair,) = json.loads(run("compare", store / "math", store / "math", "-w", 1, "-w", -1, "--json")[1])
    assert pair["total"]["norm_sum"] == pytest.approx(0, abs=1e-5)
    assert pair["total"]["norm_a"] > 1


def test_versions_of_one_name_are_distinguished(run: Run, store: Path) -> None:
    AdapterStore(store).publish(store / "law", "math")
    versions = [entry.version for entry in AdapterStore(store).list() if entry.name == "math"]
    _, out, _ = run("compare", *(f"{store}/math@{version}" for version in versions), "--json")
    (pair,) = json.loads(out)
    assert {pair["a"], pair["b"]} == {f"math@{version[:6]}" for version in versions}


def test_duplicates_are_found(run: Run, store: Path) -> None:
    AdapterStore(store).publish(store / "law", "copy")
    code, out, _ = run("duplicates", store, "--json")
    assert code == 0
    (pair,) = json.loads(out)
    assert {Path(pair["a"]).name.partition("@")[0], Path(pair["b"]).name} == {"copy", "law"}
    assert "of 1 adapters, no two" in run("duplicates", store / "law")[1]


# --- merge, alias, remove


def test_merge_publishes_a_new_adapter(run: Run, store: Path) -> None:
    code, out, _ = run("merge", store / "math", store / "law", "-w", 1, "-w", -0.5, "-o", store / "both", "--values", "float32")
    assert code == 0
    assert out.startswith("published both@")
    both, parts = load_adapter(AdapterStore(store).find("both").folder), [load_adapter(store / name) for name in ("math", "law")]
    for name, b in both.modules.items():
        expected = parts[0].modules[name].dense() - 0.5 * parts[1].modules[name].dense()
        torch.testing.assert_close(both.config.scale_of(name) * b.dense(), parts[0].config.scale * expected)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude"])
def test_merge_by_another_method(run: Run, store: Path, method: str) -> None:
    code, _, _ = run("merge", store / "math", store / "law", "--method", method, "--density", 0.4, "-o", store / "both")
    assert code == 0
    assert load_adapter(AdapterStore(store).find("both").folder).config.lori.training["merge"]["method"] == method


def test_a_missing_weight_is_refused(run: Run, store: Path) -> None:
    code, _, err = run("merge", store / "math", store / "law", "-w", 1, "-o", store / "both")
    assert code == 2
    assert "expected 2" in err


def test_an_alias_is_made_and_removed(run: Run, store: Path) -> None:
    assert run("alias", store, "prod", "math")[0] == 0
    assert "prod" in run("list", store)[1]
    assert run("remove", store, "math")[0] == 1  # the alias prod means math
    assert run("remove", store, "prod")[0] == run("remove", store, "math")[0] == 0
    assert set(AdapterStore(store).current()) == {"law", "code"}


# --- in and out


def test_a_damaged_store_is_listed_and_can_be_repaired(run: Run, store: Path) -> None:
    # Regression: one dangling alias made the whole store unlistable, and could not be removed.
    AdapterStore(store).alias("prod", "math")
    shutil.rmtree(AdapterStore(store).find("math").folder)
    code, out, err = run("list", store, "--brief")
    assert code == 1
    assert "law" in out
    assert "the alias 'prod' means math@" in err
    assert run("remove", store, "prod")[0] == run("remove", store, "math")[0] == 0
    assert run("list", store)[0] == 0


def test_verifying_an_empty_store_fails(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = run("verify", tmp_path / "empty")
    assert (code, err) == (1, f"error: {tmp_path / 'empty'} holds no adapter\n")


def test_an_adapter_is_compared_with_itself(run: Run, store: Path) -> None:
    pairs = json.loads(run("compare", store / "math", store / "math", store / "law", "--json")[1])
    assert len(pairs) == 3  # regression: two pairs
    assert pairs[0]["total"]["cosine"] == pytest.approx(1)


def test_a_name_of_both_a_folder_and_an_alias_is_ambiguous(run: Run, store: Path) -> None:
    AdapterStore(store).publish(store / "law", "math")
    save(store / "math", make_config(basis=Seeded()), make_modules(seed=7))
    for command in ("inspect", "verify"):
        code, _, err = run(command, store / "math")
        assert code == 1
        assert "is an alias and a folder of its own" in err


@pytest.mark.parametrize("options", [["--density", 0.1], ["--sign", "total"], ["--seed", 3], ["--method", "ties", "--seed", 3]])
def test_an_option_without_effect_is_refused(run: Run, store: Path, options: list[object]) -> None:
    code, _, err = run("merge", store / "math", store / "law", "-o", store / "x", *options)
    assert code == 2
    assert "has no " in err


def test_every_command_that_creates_something_can_print_json(run: Run, store: Path, tmp_path: Path) -> None:
    made = json.loads(run("merge", store / "math", store / "law", "-o", store / "both", "--json")[1])
    assert made["name"] == "both"
    assert json.loads(run("pack", store / "both", tmp_path / "x", "--json")[1])["version"] == made["version"]
    assert json.loads(run("unpack", tmp_path / "x", tmp_path / "in", "--json")[1])["version"] == made["version"]
    assert json.loads(run("export", store / "both", tmp_path / "peft", "--json")[1])["bytes"] > 1000
    assert json.loads(run("import", store / "math", tmp_path / "in", "--name", "c", "--json")[1])["name"] == "c"
    assert json.loads(run("alias", store, "prod", "both", "--json")[1])["means"].startswith("both@")
    assert json.loads(run("remove", store, "prod", "--json")[1]) == {"removed": ["prod"]}


def test_text_from_a_file_is_escaped_for_the_terminal(run: Run, store: Path) -> None:
    save(store / "math", make_config(basis=Seeded()).model_copy(update={"base_model_name_or_path": "x\x1b[2Jy"}), make_modules())
    _, out, _ = run("list", store)
    assert "\x1b" not in out
    assert "x\\x1b[2Jy" in out


@pytest.mark.parametrize("output", ["x", "store", "store/math/zz"])
def test_an_output_that_is_not_store_and_name_is_refused(
    run: Run, store: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(store.parent)
    before = sorted(store.parent.rglob("*"))
    code, _, err = run("merge", store / "math", store / "law", "-o", output)
    assert code == 1
    assert "expected" in err
    assert sorted(store.parent.rglob("*")) == before


def test_an_adapter_without_its_weights_is_listed_as_such(run: Run, store: Path) -> None:
    (store / "law" / WEIGHTS_FILE).unlink()
    code, out, _ = run("list", store)
    assert code == 1
    assert "adapter_model.safetensors is missing" in out


@pytest.mark.parametrize("options", [["--density", 0], ["--density", 7]])
def test_an_option_out_of_range_is_a_wrong_command(run: Run, store: Path, options: list[object]) -> None:
    assert run("merge", store / "math", store / "law", "--method", "ties", "-o", store / "x", *options)[0] == 2
