"""Wrong models and wrong starts: the error names the command or the flag to type next."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import anyio
import httpx
import pytest
import torch
from safetensors.torch import save

from lori.base_identity import identify_files
from lori.base_model import load_base_model
from lori.cli.program import main as lori
from lori.errors import ModelError
from lori.loopback import direct_mounts
from server.client import AsyncClient, Client
from server.program import run as serve
from server.transport.sockets import ListenError
from tests.server.conftest import Run
from tests.server.live import LIMIT_S, REPOSITORY, Live, run_main
from tests.server.peft_folders import LORA
from training.evaluation.answerer import AnswerError
from training.evaluation.server_answerer import Server

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
    """Regression: without a tokenizer, another model's was loaded, or transformers printed a page of its own."""
    spoil, message = MODELS[lack]
    folder = spoil(shutil.copytree(writer_model, tmp_path / "model"))
    for load in (identify_files, lambda name: load_base_model(name, torch.float32)):
        if lack == "no tokenizer" and load is identify_files:
            continue
        with pytest.raises(ModelError) as caught:
            load(str(folder))
        assert message in str(caught.value)
        assert f"`hf download OWNER/NAME --local-dir {folder}`" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_adapter_given_as_the_model_is_refused_with_the_right_flag(store: Path) -> None:
    with pytest.raises(ModelError, match="it is an adapter and no base model: pass the folder that holds it as --adapters"):
        load_base_model(str(store / "calm"), torch.float32)


def test_an_import_for_a_missing_model_ends_with_one_line(run: Run, store: Path, tmp_path: Path) -> None:
    code, text = run(lori, "import", store / "lora", tmp_path / "new", "--model", "nobody/nothing")
    assert code == 1
    assert text.count("\n") == 1
    assert "pass the folder as --model" in text


def test_an_import_for_the_wrong_model_names_the_right_one(run: Run, store: Path, other_model: Path, tmp_path: Path) -> None:
    """Regression: the error had a line for each tensor."""
    code, text = run(lori, "import", store / "lora", tmp_path / "new", "--model", other_model)
    assert code == 1
    assert text.count("\n") == 2
    assert "trained on the base own/llama, and does not fit tiny-other: pass --model own/llama" in text


# --- starts


@pytest.fixture
def run_server(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Return a function that runs `python -m server` in this process, without its log and its signal handlers."""
    for name in ("configure_log", "configure_start", "raise_descriptor_limit"):
        monkeypatch.setattr(f"server.program.{name}", lambda *_: None)
    monkeypatch.setattr("server.program.signal.signal", lambda *_: None)
    return lambda *flags: run(serve, *flags)


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--port", "PORT"], ["cannot listen on 127.0.0.1:PORT: Address already in use; pass another --port"]),
        (["--host", "192.0.2.1", "--open"], ["cannot listen on 192.0.2.1:0: ", "pass a --host that is an address of this"]),
        (["--model", "nobody/nothing"], ["'nobody/nothing': there is no such folder", "HF_HUB_OFFLINE", "folder as --model"]),
        (["--model", "STORE/calm"], ["it is an adapter and no base model: pass the folder that holds it as --adapters"]),
        (["--adapters", "STORE/calm"], ["STORE/calm is an adapter", "pass the folder that holds it"]),
        (["--adapters", "STORE", "--strict"], [LORA, "peft_type is IA3", "trained on the base tiny-other"]),
    ],
)
def test_a_wrong_start_ends_with_the_flag_to_type(
    run_server: Run, writer_model: Path, store: Path, flags: list[str], messages: list[str]
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
        for part in messages:
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


@pytest.mark.slow
def test_the_program_that_is_given_a_lora_s_folder_ends_with_two_lines(writer_model: Path, store: Path, tmp_path: Path) -> None:
    """Run the program as a process, and check all its output."""
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
    ("port", "error", "message"),
    [
        (80, OSError(errno.EACCES, "Permission denied"), "127.0.0.1:80: Permission denied; ports below 1024 are the system's: "),
        (80, OSError(errno.EACCES, "Permission denied"), "--port 8000"),
        (8000, OSError(errno.EACCES, "Permission denied"), "pass another --port"),
        (80, OSError(errno.EADDRINUSE, "Address already in use"), "pass another --port"),
        (8000, OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"), "pass a --host"),
        (8000, socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "pass a --host"),
    ],
)
def test_an_address_that_is_refused_names_the_flag(port: int, error: OSError, message: str) -> None:
    assert message in str(ListenError("127.0.0.1", port, error))


def test_the_installed_program_is_ours_beside_files_of_the_same_names(tmp_path: Path) -> None:
    """Start the installed script, since `python -m server` would run a server.py of the working folder."""
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
    code = "from importlib.util import find_spec\nprint(*(find_spec(name).origin for name in ('server', 'lori', 'training')))"
    safe = [sys.executable, "-P", "-c", code]
    done = subprocess.run(safe, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(REPOSITORY / name / "__init__.py") for name in ("server", "lori", "training")]


# --- a proxy in the environment


@pytest.fixture
def _behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a proxy in the environment at which nothing listens."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_behind_a_proxy")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_our_own_clients_ask_this_machine_without_a_proxy(served: Live, host: str) -> None:
    """Regression: the clients sent requests to the proxy, for which 127.0.0.1 is the proxy's own machine."""
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
    assert Server(f"http://127.0.0.1:{served.port}").adapters("calm")
    with pytest.raises(AnswerError):
        Server("http://lori.invalid:8000", 1).adapters("calm")


@pytest.mark.parametrize(
    "url", ["http://10.0.0.5:8000", "https://example.org", "http://localhost.example.org", "http://[fe80::1]"]
)
def test_other_machines_are_asked_as_the_environment_says(url: str) -> None:
    assert direct_mounts(url) == {}


@pytest.mark.parametrize(
    "url",
    ["http://0.0.0.0:8000", "http://localhost.:8000", "http://[::ffff:127.0.0.1]:8000", "http://[::]:8000", "http://a.localhost"],
)
def test_this_machine_has_many_names(url: str) -> None:
    """Check the names of this machine, including those that servers print."""
    assert direct_mounts(url)
