"""Cost of logging and tracing every request: streams of a fake engine over sockets (`python -m tests.bench.operations`).

The server and its users have one core each, if there are two. Each round measures every case; a figure is the median over the
rounds.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import psutil

from lori.cli.output import print_table
from server.app import create_app
from server.engine.adapters.registry import Registry
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.thread import EngineThread
from server.http_server import DrainingServer, http_config
from server.service.service import Service
from server.settings import Settings
from server.telemetry.logs import configure_log
from server.telemetry.metrics import Metrics
from server.telemetry.request_log import RequestLog
from server.telemetry.spans import Spans
from tests.server.live import ADDRESS, wait_until
from tests.server.otlp import collector
from tests.server.rig import FakeEngine
from tests.tiny import tiny_tokenizer

CASES = ("without", "text", "json", "traced")
BODY = json.dumps({"prompt": "x", "stream": True, "max_tokens": 64}).encode()
REQUEST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(BODY),
    BODY,
)
END = b"0\r\n\r\n"


def serve(case: str, num_steps: int, traces: str) -> None:
    """Run a server on a free port until it is killed."""
    configure_log("json" if case == "json" else "text")
    tokenizer, registry = tiny_tokenizer(), Registry([])
    engine = EngineThread(cast(Engine, FakeEngine(num_steps=num_steps)))
    service = Service(Settings(port=0), "fake", registry, Admission(tokenizer, registry, 1024), engine, Metrics("fake"))
    app = create_app(service)
    if case == "without":
        app.user_middleware = [middleware for middleware in app.user_middleware if middleware.cls is not RequestLog]
    if case == "traced":
        Spans(traces).instrument(app)
    DrainingServer(http_config(app, service.settings), service).run()


@contextmanager
def served(case: str, log: Path, num_steps: int, traces: str) -> Iterator[tuple[int, psutil.Process]]:
    """Context manager of a server in a process of its own; yields its port and the process."""
    command = [sys.executable, "-m", "tests.bench.operations", "--serve", case, "--tokens", str(num_steps), "--traces", traces]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            pin(process.pid, 0)
            wait_until(lambda: process.poll() is not None or ADDRESS.search(log.read_text()) is not None, "the server")
            match = ADDRESS.search(log.read_text())
            assert match, log.read_text()
            yield int(match[1].rpartition(":")[2]), psutil.Process(process.pid)
        finally:
            process.kill()


def pin(process: int, core: int) -> None:
    """Pin a process to one core, if the machine has more than one."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(process, {core})


async def load(port: int, num_users: int, seconds: float) -> int:
    """Return the number of answers that `num_users` get in a closed loop of `seconds`."""
    loop = asyncio.get_running_loop()
    end, num_answers = loop.time() + seconds, 0

    async def user() -> None:
        nonlocal num_answers
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while loop.time() < end:
            writer.write(REQUEST)
            await reader.readuntil(END)
            num_answers += 1
        writer.close()

    await asyncio.gather(*(user() for _ in range(num_users)))
    return num_answers


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--serve", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--traces", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.tokens, arguments.traces)
        return
    pin(0, 1)
    milliseconds: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder, collector() as traces:
        for number in range(arguments.rounds):
            for case in CASES[number % 2 :] + CASES[: number % 2]:
                with served(case, Path(folder) / "log", arguments.tokens, traces.url) as (port, process):
                    asyncio.run(load(port, arguments.users, 1))
                    milliseconds[case].append(measured(process, port, arguments.users, arguments.seconds))
    rows = []
    for case, times in milliseconds.items():
        ratios = [plain_ms / case_ms for case_ms, plain_ms in zip(times, milliseconds["without"], strict=True)]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"
        rows.append([case, f"{statistics.median(times):.2f}", ratio])
    print_table(["request log", "CPU ms an answer", "throughput of without"], rows)


def measured(process: psutil.Process, port: int, num_users: int, seconds: float) -> float:
    """Return the server's CPU time for an answer in ms. It does not depend on other load of the machine."""
    before = sum(process.cpu_times()[:2])
    num_answers = asyncio.run(load(port, num_users, seconds))
    return 1000 * (sum(process.cpu_times()[:2]) - before) / num_answers


if __name__ == "__main__":
    main()
