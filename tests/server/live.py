"""Real servers for tests: `python -m server` as a process, or an app with a fake engine in a thread of the test's own process."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from lori.native import MAX_ISA_VARIABLE
from server.app import create_app
from server.http_server import DrainingServer, http_config
from server.service.service import Service
from server.settings import Settings

LIMIT_S = 120
"""Seconds that anything may take on a busy machine before a test gives up."""
MAX_BODY_BYTES = 16384
"""--max-body-bytes of the session's server."""
HOST = "x"
"""The Host header of requests that tests write by hand."""
REPOSITORY = Path(__file__).parents[2]
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
ADDRESS = re.compile(r"Uvicorn running on (http://127\.0\.0\.1:\d+)")


def wait_until(is_so: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Poll until `is_so` returns true; fail after `limit_s`."""
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end, f"waited {limit_s:g} s for {what}"
        time.sleep(0.01)


class Process(Protocol):
    """The part of `subprocess.Popen` that tests use."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...


def environment() -> dict[str, str]:
    """Return the environment of a server, see `run_main`."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("LORI_") or key == MAX_ISA_VARIABLE}
    return variables | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LORI_ALLOW_HOST": HOST}


def run_main(log: Path, *flags: str, module: str = "server", within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start `python -m server` with `flags`. Both output streams go to `log`.

    The server takes no settings from the environment except the allowed host `HOST` and the limit on instruction sets, and has
    no network. `within` is a program with its arguments that replaces itself by the server.
    """
    with log.open("wb") as file:
        return subprocess.Popen(
            [*within, sys.executable, "-m", module, *flags],
            cwd=REPOSITORY,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )


class RunProgram(Protocol):
    """A function that starts a program with flags, such as `run_main`."""

    def __call__(self, log: Path, *flags: str, module: str = ...) -> Process: ...


@dataclass(frozen=True, slots=True)
class Live:
    """A server that answers at `url`."""

    url: str
    process: Process
    log: Path
    client: httpx.Client

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def generate(self, **body: object) -> dict[str, Any]:
        """Return the reply of POST /generate. Fail unless its status is 200."""
        reply = self.client.post("/generate", json=body)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have `labels`; 0 if there is none yet."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return sum(s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items())

    def wait_for(self, **numbers: int) -> None:
        """Wait until the numbers of `running` and `waiting` requests are those given."""
        names = {"running": RUNNING, "waiting": WAITING}
        for key, number in numbers.items():
            wait_until(lambda key=key, number=number: self.metric(names[key]) == number, f"{number} {key} requests")


@contextmanager
def start(log: Path, *flags: str, module: str = "server", run: RunProgram = run_main) -> Iterator[Live]:
    """Run a server on a free port until the block ends."""
    process = run(log, "--port", "0", *flags, module=module)
    try:
        wait_until(lambda: process.poll() is not None or ADDRESS.search(log.read_text()) is not None, "the server")
        match = ADDRESS.search(log.read_text())
        assert match, log.read_text()
        with httpx.Client(base_url=match[1], timeout=LIMIT_S) as client:
            yield Live(match[1], process, log, client)
    finally:
        process.kill()
        process.wait()


def serve_here(service: Service) -> AbstractContextManager[httpx.Client]:
    """Serve `service` as `python -m server` does, but on a free port and from a thread of this process, until the block ends."""
    config = http_config(create_app(service), service.settings.model_copy(update={"port": 0}))
    return _run(DrainingServer(config, service))


def serve_app(app: ASGIApp) -> AbstractContextManager[httpx.Client]:
    """Serve `app` with the product's HTTP protocol and default settings, as `serve_here` does."""
    return _run(uvicorn.Server(http_config(app, Settings(port=0))))


@contextmanager
def _run(server: uvicorn.Server) -> Iterator[httpx.Client]:
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, "the server")
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client:
            yield client
    finally:
        server.handle_exit(signal.SIGINT, None)
        thread.join()


def events(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the data of each server-sent event in `lines`."""
    name, data = "", ""
    for line in lines:
        key, _, value = line.partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            data += value
        elif not line:
            yield name, json.loads(data)
            name, data = "", ""
