"""Fixtures of the server's tests: a tiny model, sound and unsound adapters for it, and real servers for the whole session."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lori.base_model import BaseModel, load_base_model
from tests.server.forked import start_forked
from tests.server.live import MAX_BODY_BYTES, Live, start
from tests.server.peft_folders import write_wrong_store
from tests.server.rig import EOS, save_writer_model, write_adapters
from tests.tiny import save_tiny_model, tiny_llama_config, tiny_tokenizer

KV_TOKENS = 8192
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Run torch in one thread: tiny models gain nothing from a second one, and lose much time to it on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tiny models' tokenizer, which has a token for every byte."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def writer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model that generates printable ASCII and never ends by itself."""
    return save_writer_model(tmp_path_factory.mktemp("models") / "tiny-writer")


@pytest.fixture(scope="session")
def writer(writer_model: Path) -> BaseModel:
    """Return the model of `writer_model` as transformers runs it. Tests must not change it."""
    return load_base_model(str(writer_model), torch.float32)


@pytest.fixture(scope="session")
def adapters(writer: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the adapters math, safety and intent for `writer_model`."""
    return write_adapters(tmp_path_factory.mktemp("adapters"), writer)


@pytest.fixture(scope="session")
def live(writer_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Yield a real server with `writer_model` and `adapters`. Its KV memory holds two requests of 4000 tokens, not three."""
    num_bytes = KV_TOKENS * 2 * 2 * 2 * 16 * 4
    flags = ["--model", str(writer_model), "--adapters", str(adapters), "--dtype", "float32", "--threads", "1"]
    flags += ["--max-step-tokens", "48", "--max-batch", "16"]
    flags += ["--kv-cache-gib", str(num_bytes / 2**30), "--max-body-bytes", str(MAX_BODY_BYTES)]
    with start(tmp_path_factory.mktemp("live") / "log", *flags) as server:
        yield server


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a base model whose layers have other shapes than the writer's."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-other", tiny_llama_config(EOS + 1, hidden_size=64))


@pytest.fixture(scope="session")
def store(writer: BaseModel, other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of one sound adapter and of `peft_folders.ADAPTERS`. Tests must not change it."""
    place = tmp_path_factory.mktemp("wrong") / "store"
    write_wrong_store(place, writer, load_base_model(str(other_model), torch.float32))
    return place


@pytest.fixture(scope="session")
def served(writer_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Yield a real server of `store`, without keys."""
    flags = ["--model", str(writer_model), "--adapters", str(store), "--dtype", "float32", "--threads", "1"]
    with start_forked(tmp_path_factory.mktemp("served") / "log", *flags, "--kv-cache-gib", "0.01") as live:
        yield live


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a program in this process and returns its exit code and its output."""

    def call(main: Callable[[], int], *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, "".join(capfd.readouterr())

    return call
