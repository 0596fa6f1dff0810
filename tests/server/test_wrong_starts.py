"""Wrong folders and wrong starts: what is said names the command or the flag to type next."""

import errno
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import torch
from safetensors.torch import save, save_file

from lori.base_identity import identify_files
from lori.base_model import BaseModel, load_base_model
from lori.cli.program import main as lori
from lori.config_file import CONFIG_FILE
from lori.errors import FOLDER, AdapterError, AdapterFormatError, ModelError
from lori.format import PICKLE_FILE, WEIGHTS_FILE, load_adapter
from lori.loopback import direct_mounts
from lori.peft_config import peft_fault
from lori.store import AdapterStore
from server.client import AsyncClient, Client
from server.program import run as serve
from server.transport.ports import ListenError
from tests.server.live import LIMIT_S, REPOSITORY, Live, run_main, start
from tests.server.office import Office, open_office
from tests.server.rig import EOS, write_adapter
from tests.tiny import save_tiny_model, tiny_llama_config
from training.evaluate import main as evaluate
from training.evaluation.answerer import AnswerError
from training.evaluation.server import Server
from training.fit import main as fit

CONFIG = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "own/llama", "bias": "none", "corda_config": None,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16,
    "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "peft_type": "LORA", "peft_version": "0.21.0", "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None,
    "target_modules": ["q_proj", "v_proj"], "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip
"""As PEFT writes it."""
ADAPTERS = {
    "lora": f"`python -m lori import {FOLDER} STORE --model own/llama`",
    "embedded": f"`python -m lori import {FOLDER} STORE`",
    "local": f"`python -m lori import {FOLDER} STORE --model BASE`",
    "dora": "cannot be imported: use_dora is True: it changes what the adapter does, and only plain LoRA can be imported",
    "ia3": "peft_type is IA3: it cannot be imported, since only plain LoRA adds B A x to a layer's output",
    "prompt": "peft_type is PROMPT_TUNING: it cannot be imported",
    "pickled": "write it with save_pretrained(folder, safe_serialization=True), and import that",
    "foreign": "or train or import an adapter for the base that is loaded",
}
"""Folders that are no sound adapters of the base, and what is said of each."""
LORA = "`python -m lori import STORE/lora STORE --model own/llama`"
"""What is said of the first to who may read where it lies."""


def write_lora(folder: Path, base: BaseModel, **changes: Any) -> Path:
    """Writes a LoRA as PEFT does, for two projections of `base`, with an A of its own; `changes` are of its config."""
    random = torch.Generator().manual_seed(1)
    folder.mkdir(parents=True)
    tensors = {}
    for name, (num_outputs, num_inputs) in base.identity.shapes.items():
        if name.rpartition(".")[2] in CONFIG["target_modules"]:
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, num_inputs, generator=random)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(num_outputs, 4, generator=random)
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG | changes))
    return folder


def pickle_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"x": torch.zeros(1)}, folder / PICKLE_FILE)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another base than the writer, whose layers have other shapes."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-other", tiny_llama_config(EOS + 1, hidden_size=64))


@pytest.fixture(scope="module")
def store(writer: BaseModel, other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one sound adapter and of `ADAPTERS`."""
    place = tmp_path_factory.mktemp("wrong") / "store"
    write_adapter(place / "calm", writer, seed=1)
    write_lora(place / "lora", writer)
    write_lora(place / "embedded", writer, base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct")
    write_lora(place / "local", writer, base_model_name_or_path="/home/somebody/it's; a model")
    write_lora(place / "dora", writer, use_dora=True)
    for name, kind in (("ia3", "IA3"), ("prompt", "PROMPT_TUNING")):
        write_lora(place / name, writer)
        (place / name / CONFIG_FILE).write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": "own/llama"}))
    pickle_weights(write_lora(place / "pickled", writer))
    write_adapter(place / "foreign", load_base_model(str(other_model), torch.float32), seed=2)
    return place


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a program in this process, and returns its exit code and all that it printed."""

    def call(main: Callable[[], int], *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, "".join(capfd.readouterr())

    return call


# --- folders among the adapters


@pytest.fixture(scope="module")
def served(writer_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A real server of that store, without keys."""
    flags = ["--model", str(writer_model), "--adapters", str(store), "--dtype", "float32", "--threads", "1"]
    with start(tmp_path_factory.mktemp("served") / "log", *flags, "--kv-cache-gib", "0.01") as live:
        yield live


@pytest.mark.parametrize(("name", "said"), ADAPTERS.items())
def test_a_wrong_folder_among_the_adapters_is_one_line_that_says_what_to_type(
    served: Live, store: Path, name: str, said: str
) -> None:
    """It was a line of 40 faults, of which the last but nine named a command without its arguments."""
    [line] = [line for line in served.log.read_text().splitlines() if f"the adapter {name!r} is damaged" in line]
    assert said.replace(FOLDER, str(store / name)) in line
    assert "Extra inputs" not in line
    [row] = [row for row in served.client.get("/adapters").json()["faulty"] if row["name"] == name]
    assert said in "; ".join(row["faults"])
    assert len(row["faults"]) == 1
    reply = served.client.post("/generate", json={"prompt": "x", "adapter": name})
    assert reply.status_code == 500
    assert said in reply.json()["error"]["message"]
    assert str(store.parent) not in reply.text + json.dumps(row), "a client is told no path of the machine"
    assert served.generate(prompt="x", max_tokens=2, adapter="calm")["text"]


def test_an_adapter_of_another_base_names_both_bases_and_the_flag(served: Live) -> None:
    [row] = [row for row in served.client.get("/adapters").json()["faulty"] if row["name"] == "foreign"]
    pattern = r"trained on the base tiny-other \([0-9a-f]{12}\), expected tiny-writer \([0-9a-f]{12}\): pass --model "
    assert re.match(pattern, row["faults"][0])


@pytest.mark.parametrize("command", ["verify", "inspect", "export", "pack", "merge", "compare", "list", "verify store"])
def test_each_command_says_how_a_peft_lora_is_imported(run: Run, store: Path, tmp_path: Path, command: str) -> None:
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


def test_training_and_evaluation_say_how_a_peft_lora_is_imported(
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


def test_the_command_that_is_told_makes_an_adapter_that_is_served(
    run: Run, writer: BaseModel, writer_model: Path, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(store / "lora")
    [command] = re.findall("`python -m lori (.*?)`", str(caught.value))
    words = [{"STORE": str(tmp_path / "new"), "own/llama": str(writer_model)}.get(word, word) for word in shlex.split(command)]
    code, text = run(lori, *words)
    assert (code, "published lora@" in text) == (0, True), text
    assert AdapterStore(tmp_path / "new").find("lora").load(writer.identity).modules


def test_an_import_into_the_folder_that_the_lora_lies_in_does_not_ask_to_remove_it(
    run: Run, writer: BaseModel, writer_model: Path, tmp_path: Path
) -> None:
    """It said: `remove it`, of what was to be imported."""
    lora = write_lora(tmp_path / "store" / "lora", writer)
    code, text = run(lori, "import", lora, tmp_path / "store", "--model", writer_model)
    assert code == 2
    assert "another --name" in text
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
def test_nothing_of_a_config_that_a_shell_would_run_is_in_the_command(base: object) -> None:
    fault = peft_fault(json.dumps(CONFIG | {"base_model_name_or_path": base}).encode())
    assert fault
    assert f"`python -m lori import {FOLDER} STORE --model BASE`" in fault


@pytest.mark.parametrize("change", [*({"peft_type": kind} for kind in ("LORI", "a b", 1, None)), {"lori": {}}])
def test_what_is_no_config_of_peft_keeps_its_own_faults(change: dict[str, Any]) -> None:
    assert peft_fault(json.dumps(CONFIG | change).encode()) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"LORA"', b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_no_config_of_peft(content: bytes) -> None:
    assert peft_fault(content) is None


# --- uploads


@pytest.fixture(scope="module")
def office(writer_model: Path, writer: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    with open_office(writer_model, writer, tmp_path_factory.mktemp("office")) as office:
        yield office


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("lora", 409, "put it there (`python -m lori import` does), and start the server again"),
        ("dora", 400, "use_dora is True"),
        ("ia3", 400, ADAPTERS["ia3"]),
        ("prompt", 400, ADAPTERS["prompt"]),
        ("foreign", 400, ADAPTERS["foreign"]),
    ],
)
def test_an_upload_says_what_to_do_instead(office: Office, store: Path, name: str, status: int, said: str) -> None:
    reply = office.upload(name, store / name)
    assert reply.status_code == status, reply.text
    assert said in reply.json()["error"]["message"]
    assert office.ask(name).status_code == 404


def test_an_upload_for_another_base_is_one_line_with_the_flag(office: Office, other_model: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", load_base_model(str(other_model), torch.float32))
    error = office.upload("lora", lora).json()["error"]
    assert error["faults"] == ["it was trained on the base own/llama, and does not fit tiny-writer: pass --model own/llama"]


def test_a_pickle_that_is_sent_as_safetensors_is_called_one(office: Office, store: Path) -> None:
    content = (store / "pickled" / PICKLE_FILE).read_bytes()
    for folder in (store / "lora", store / "calm"):
        error = office.upload("pickled", folder, weights=content).json()["error"]
        assert f"{WEIGHTS_FILE} is not a safetensors file: it is a pickle" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/adapters", {"hub_id": "own/math"}),
        ("PUT", "/adapters/prod/alias", {"adapter": "calm"}),
        ("DELETE", "/adapters/calm", None),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "calm"}),
    ],
)
def test_who_would_change_adapters_without_keys_is_told_how_to_make_one(
    served: Live, method: str, path: str, body: object
) -> None:
    reply = served.client.request(method, path, json=body)
    assert reply.status_code == 403
    message = reply.json()["error"]["message"]
    assert "`python -m server.keys keys.toml --role admin`" in message
    assert "--keys keys.toml" in message


# --- models


def no_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def in_parts(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (folder / parts["a"]).write_bytes(save({"a": torch.zeros(1)}))
    return folder


MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no tokenizer": (lambda folder: no_files(folder, "tokenizer.json"), "no tokenizer.json, tokenizer.model, nor vocab.json"),
    "no weights": (lambda folder: no_files(folder, "model.safetensors"), "there are no weights: no model.safetensors"),
    "a part of the weights": (in_parts, "weight files are missing: model-00002-of-00002.safetensors"),
    "no config": (lambda folder: no_files(folder, "config.json"), "there is no "),
}


@pytest.mark.parametrize("lack", MODELS)
def test_a_model_folder_that_lacks_files_names_them_and_how_to_get_them(writer_model: Path, tmp_path: Path, lack: str) -> None:
    """Without a tokenizer it was that of another model, or a page of transformers' own."""
    spoil, said = MODELS[lack]
    folder = spoil(shutil.copytree(writer_model, tmp_path / "model"))
    for load in (identify_files, lambda name: load_base_model(name, torch.float32)):
        if lack == "no tokenizer" and load is identify_files:
            continue
        with pytest.raises(ModelError) as caught:
            load(str(folder))
        assert said in str(caught.value)
        assert f"`hf download OWNER/NAME --local-dir {folder}`" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_adapter_that_is_given_as_the_model_is_told_where_it_belongs(store: Path) -> None:
    with pytest.raises(ModelError, match="it is an adapter and no base model: pass the folder that holds it as --adapters"):
        load_base_model(str(store / "calm"), torch.float32)


def test_an_import_for_a_model_that_is_not_there_says_so_in_a_line(run: Run, store: Path, tmp_path: Path) -> None:
    code, text = run(lori, "import", store / "lora", tmp_path / "new", "--model", "nobody/nothing")
    assert code == 1
    assert text.count("\n") == 1
    assert "pass the folder as --model" in text


def test_an_import_for_the_wrong_model_names_the_right_one(run: Run, store: Path, other_model: Path, tmp_path: Path) -> None:
    """It was a line for each tensor."""
    code, text = run(lori, "import", store / "lora", tmp_path / "new", "--model", other_model)
    assert code == 1
    assert text.count("\n") == 2
    assert "trained on the base own/llama, and does not fit tiny-other: pass --model own/llama" in text


# --- starts


@pytest.fixture
def run_server(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs `python -m server` in this process, which keeps its log and its signals."""
    for name in ("configure_log", "configure_start", "raise_descriptor_limit"):
        monkeypatch.setattr(f"server.program.{name}", lambda *_: None)
    monkeypatch.setattr("server.program.signal.signal", lambda *_: None)
    return lambda *flags: run(serve, *flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "PORT"], ["cannot listen on 127.0.0.1:PORT: Address already in use; pass another --port"]),
        (["--host", "192.0.2.1", "--open"], ["cannot listen on 192.0.2.1:0: ", "pass a --host that is an address of this"]),
        (["--model", "nobody/nothing"], ["'nobody/nothing': there is no such folder", "HF_HUB_OFFLINE", "folder as --model"]),
        (["--model", "STORE/calm"], ["it is an adapter and no base model: pass the folder that holds it as --adapters"]),
        (["--adapters", "STORE/calm"], ["STORE/calm is an adapter", "pass the folder that holds it"]),
        (["--adapters", "STORE", "--strict"], [LORA, "peft_type is IA3", "trained on the base tiny-other"]),
    ],
)
def test_a_wrong_start_ends_with_what_to_type(
    run_server: Run, writer_model: Path, store: Path, flags: list[str], said: list[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {"PORT": str(taken.getsockname()[1]), "STORE/": f"{store}/"}

        def filled(text: str) -> str:
            for name, value in values.items():
                text = text.replace(name, value)
            return str(store) if text == "STORE" else text

        code, text = run_server("--model", writer_model, "--port", "0", *map(filled, flags))
        assert code == 1, text
        assert text.startswith("error: ")
        for part in said:
            assert filled(part) in text
        assert "--strict" in flags or text.count("\n") == 1


def test_a_cache_that_cannot_be_written_names_its_variable(
    run_server: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LORI_CACHE", str(tmp_path / "file" / "cache"))
    code, text = run_server("--port", "0")
    assert code == 1
    assert text.startswith(f"error: the embedded model cannot be made in {tmp_path / 'file' / 'cache'}: ")
    assert "set LORI_CACHE to a folder that this user may write" in text


def test_the_program_that_is_given_a_lora_s_folder_ends_with_two_lines(writer_model: Path, store: Path, tmp_path: Path) -> None:
    """As a process, with all that it prints."""
    process = run_main(tmp_path / "log", "--model", str(writer_model), "--port", "0", "--adapters", str(store / "lora"))
    try:
        assert process.wait(LIMIT_S) == 1
    finally:
        process.kill()
        process.wait()
    *start, first, second = (tmp_path / "log").read_text().splitlines()
    assert all(line.startswith("INFO ") for line in start)
    assert first == f"error: {store / 'lora'} is not a sound adapter:"
    assert LORA.replace("STORE/", f"{store}/") in second


@pytest.mark.parametrize(
    ("port", "error", "said"),
    [
        (80, OSError(errno.EACCES, "Permission denied"), "127.0.0.1:80: Permission denied; ports below 1024 are the system's: "),
        (80, OSError(errno.EACCES, "Permission denied"), "--port 8000"),
        (8000, OSError(errno.EACCES, "Permission denied"), "pass another --port"),
        (80, OSError(errno.EADDRINUSE, "Address already in use"), "pass another --port"),
        (8000, OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"), "pass a --host"),
        (8000, socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "pass a --host"),
    ],
)
def test_an_address_that_is_refused_names_the_flag(port: int, error: OSError, said: str) -> None:
    assert said in str(ListenError("127.0.0.1", port, error))


def test_the_installed_program_is_ours_beside_files_of_the_same_names(tmp_path: Path) -> None:
    """`python -m server` runs what the working folder has under that name."""
    for name in ("server", "lori", "training"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('theirs')\n")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["lori-server"].partition(":")
    script = tmp_path / "bin" / "lori-server"
    script.parent.mkdir()
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")  # as pip writes it
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), "--prot", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: there is no flag --prot: did you mean --port?\n")
    found = "from importlib.util import find_spec\nprint(*(find_spec(name).origin for name in ('server', 'lori', 'training')))"
    safe = [sys.executable, "-P", "-c", found]
    done = subprocess.run(safe, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(REPOSITORY / name / "__init__.py") for name in ("server", "lori", "training")]


# --- a proxy in the environment


@pytest.fixture
def _behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names a proxy at which nobody listens."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_behind_a_proxy")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_our_own_clients_ask_this_machine_without_a_proxy(served: Live, host: str) -> None:
    """They asked the proxy, for which 127.0.0.1 is itself."""
    url = f"http://{host}:{served.port}"
    with httpx.Client() as plain, pytest.raises(httpx.ConnectError):
        plain.get(f"{url}/health")
    with Client(url) as client:
        assert client.health()

    async def ask() -> None:
        async with AsyncClient(url) as client:
            assert await client.health()

    anyio.run(ask)


@pytest.mark.usefixtures("_behind_a_proxy")
def test_an_evaluation_asks_this_machine_without_a_proxy(served: Live) -> None:
    assert Server(f"http://127.0.0.1:{served.port}").adapter("calm").version
    with pytest.raises(AnswerError):
        Server("http://lori.invalid:8000", 1).adapter("calm")


@pytest.mark.parametrize(
    "url", ["http://10.0.0.5:8000", "https://example.org", "http://localhost.example.org", "http://[fe80::1]"]
)
def test_other_machines_are_asked_as_the_environment_says(url: str) -> None:
    assert direct_mounts(url) == {}
