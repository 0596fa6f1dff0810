"""vllm-router as a process in front of the tests' servers, with the flags and environment of docker/compose.router.yaml."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.transport.sockets import free_port
from tests.docker.compose import read
from tests.server.live import LIMIT_S, REPOSITORY, wait_until

SERVICE: dict[str, Any] = read(REPOSITORY / "docker" / "compose.router.yaml")["services"]["router"]


def flags(port: int, urls: Sequence[str]) -> list[str]:
    """Return compose's command with another address, other servers, and a free port for the router's own metrics."""
    common = [flag for flag in SERVICE["command"] if not flag.startswith(("--host=", "--port=", "--worker-urls", "http://"))]
    own = [f"--port={port}", f"--prometheus-port={free_port()}", "--worker-startup-check-interval=1"]
    return [*common, *own, "--worker-urls", *urls]


@contextmanager
def routing(log: Path, urls: Sequence[str]) -> Iterator[httpx.Client]:
    """Run a router in front of the servers at `urls` until the block ends."""
    port = free_port()
    command = [sys.executable, "-m", "vllm_router.launch_router", *flags(port, urls)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=os.environ | SERVICE["environment"], stdout=file, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client:
            wait_until(lambda: process.poll() is not None or _is_ready(client), "vllm-router")
            assert process.poll() is None, log.read_text()
            yield client
    finally:
        process.kill()
        process.wait()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readiness").status_code == 200
    except httpx.ConnectError:
        return False
