"""PEFT folders in place of adapters of ours: each is reported in one line with the command to type."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from lori.base_model import BaseModel
from lori.cli.program import main as lori
from lori.errors import FOLDER, AdapterError, AdapterFormatError
from lori.format import load_adapter
from lori.peft.config import peft_fault
from lori.store.store import AdapterStore
from tests.server.conftest import Run
from tests.server.live import Live
from tests.server.peft_folders import ADAPTERS, CONFIG, write_lora
from tests.server.rig import write_adapter
from training.evaluate import main as evaluate
from training.fit import main as fit


@pytest.mark.slow
@pytest.mark.parametrize(("name", "advice"), ADAPTERS.items())
def test_a_wrong_folder_among_the_adapters_is_one_line_with_the_command_to_type(
    served: Live, store: Path, name: str, advice: str
) -> None:
    """Regression: the line had 40 faults, of which the last but nine named a command without its arguments."""
    [line] = [line for line in served.log.read_text().splitlines() if f"the adapter {name!r} is damaged" in line]
    assert advice.replace(FOLDER, str(store / name)) in line
    assert "Extra inputs" not in line
    [row] = [row for row in served.client.get("/adapters").json()["faulty"] if row["name"] == name]
    assert advice in "; ".join(row["faults"])
    assert len(row["faults"]) == 1
    reply = served.client.post("/generate", json={"prompt": "x", "adapter": name})
    assert reply.status_code == 500
    assert advice in reply.json()["error"]["message"]
    assert str(store.parent) not in reply.text + json.dumps(row), "a client sees no path of the machine"
    assert served.generate(prompt="x", max_tokens=2, adapter="calm")["text"]


def test_an_adapter_of_another_base_names_both_bases_and_the_flag(served: Live) -> None:
    [row] = [row for row in served.client.get("/adapters").json()["faulty"] if row["name"] == "foreign"]
    pattern = r"trained on the base tiny-other \([0-9a-f]{12}\), expected tiny-writer \([0-9a-f]{12}\): pass --model "
    assert re.match(pattern, row["faults"][0])


@pytest.mark.parametrize("command", ["verify", "inspect", "export", "pack", "merge", "compare", "list", "verify store"])
def test_each_command_names_the_import_of_a_peft_lora(run: Run, store: Path, tmp_path: Path, command: str) -> None:
    shutil.copytree(store / "lora", tmp_path / "kept" / "lora")
    lora = tmp_path / "kept" / "lora"
    arguments = {
        "verify": ("verify", lora),
        "inspect": ("inspect", lora),
        "export": ("export", lora, tmp_path / "exported"),
        "pack": ("pack", lora, tmp_path / "packed.lori"),
        "merge": ("merge", store / "calm", lora, "-o", tmp_path / "made" / "both"),
        "compare": ("compare", store / "calm", lora),
        "list": ("list", lora),
        "verify store": ("verify", tmp_path / "kept"),
    }
    code, text = run(lori, *arguments[command])
    assert code == 1
    assert text.count(f"`python -m lori import {lora} STORE --model own/llama`") == 1
    assert "Extra inputs" not in text


def test_a_list_of_a_store_names_the_command(run: Run, store: Path) -> None:
    code, text = run(lori, "list", store, "--json")
    faults = {row["name"]: row.get("fault", "") for row in json.loads(text)}
    assert code == 1
    assert all(ADAPTERS[name].replace(FOLDER, str(store / name)) in faults[name] for name in ADAPTERS if name != "foreign")


def test_training_and_evaluation_name_the_import_of_a_peft_lora(
    run: Run, writer_model: Path, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    given = ("--data", tmp_path / "rows.jsonl", "--model", writer_model)
    wanted = ("--output", tmp_path / "new", "--steps", 1, "--rank", 4)
    for code, text in (
        run(evaluate, *given, "--metric", "loss", "--local", "--adapter", store / "lora"),
        run(evaluate, *given, "--metric", "loss", "--local", "--adapters", store, "--adapter", "lora"),
        run(fit, *given, *wanted, "--init-from", store / "lora"),
        run(fit, *given, *wanted, "--avoid", store / "lora"),
    ):
        assert code == 1
        assert f"`python -m lori import {store / 'lora'} STORE --model own/llama`" in text


def test_the_named_command_makes_an_adapter_that_is_served(
    run: Run, writer: BaseModel, writer_model: Path, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(store / "lora")
    [command] = re.findall("`python -m lori (.*?)`", str(caught.value))
    words = [{"STORE": str(tmp_path / "new"), "own/llama": str(writer_model)}.get(word, word) for word in shlex.split(command)]
    code, text = run(lori, *words)
    assert (code, "published lora@" in text) == (0, True), text
    assert AdapterStore(tmp_path / "new").find("lora").load(writer.identity).modules


def test_an_import_into_the_lora_s_own_folder_does_not_ask_to_remove_it(
    run: Run, writer: BaseModel, writer_model: Path, tmp_path: Path
) -> None:
    """Regression: the error said `remove it` about the folder that was to be imported."""
    lora = write_lora(tmp_path / "store" / "lora", writer)
    code, text = run(lori, "import", lora, tmp_path / "store", "--model", writer_model)
    assert code == 2
    assert "another --name" in " ".join(text.replace("│", " ").split()), text
    assert "remove" not in text
    with pytest.raises(AdapterError, match=r"move it to another folder, or take another name$"):
        AdapterStore(tmp_path / "store").publish(write_adapter_of(tmp_path / "lora", writer))
    assert lora.is_dir()


def write_adapter_of(folder: Path, base: BaseModel) -> Path:
    write_adapter(folder, base, seed=7)
    return folder


def test_a_name_with_spaces_is_quoted_for_the_shell(writer: BaseModel, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "my $(own) LoRA", writer)
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(folder)
    [command] = re.findall("`(.*?)`", str(caught.value))
    assert shlex.split(command)[4] == str(folder)


@pytest.mark.parametrize("base", ["own/llama; rm -rf ~", "-x/y", "a/$(b)", "own/llama\n", None, "../x", "x" * 999 + "/y"])
def test_the_command_has_no_part_of_a_config_that_a_shell_would_run(base: object) -> None:
    fault = peft_fault(json.dumps(CONFIG | {"base_model_name_or_path": base}).encode())
    assert fault
    assert f"`python -m lori import {FOLDER} STORE --model BASE`" in fault


@pytest.mark.parametrize("change", [*({"peft_type": kind} for kind in ("LORI", "a b", 1, None)), {"lori": {}}])
def test_a_config_that_is_not_peft_s_keeps_its_own_faults(change: dict[str, Any]) -> None:
    assert peft_fault(json.dumps(CONFIG | change).encode()) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"LORA"', b"\xff", b"[" * 100_000])
def test_content_that_is_no_json_object_is_no_peft_config(content: bytes) -> None:
    assert peft_fault(content) is None
