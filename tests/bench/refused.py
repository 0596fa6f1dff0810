"""Effect of refused requests on another client (the neighbour), and memory of request bodies in transit.

    python -m tests.bench.refused --server-cores 0 --client-cores 1 [--seconds 20] [-- flags of the server]

It starts `python -m server` on the server's cores and everything else on the clients' cores. First the neighbour streams alone,
then beside four clients that send 1 MiB bodies of one kind without a pause; all of these are refused. For each kind a line has
the neighbour's longest gap between two tokens and the 95th percentile of its time to the first token, relative to the quiet run,
and the server's CPU time for one such body from the socket to the refusal, which hardly depends on other load. Then 400 bodies of
1 MiB are sent at once, each without its end: a line has the growth of the server's resident memory, and the answers.

Give both sides cores that nothing else uses: on a busy machine the quiet run itself is not quiet.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from server.transport.sockets import free_port
from tests.bench.serve_figures import percentile
from tests.bench.serve_processes import Program, answers

MIB = 2**20
NUM_CLIENTS, NUM_BODIES, NUM_COSTED = 4, 400, 30
NUM_ADDRESSES = 8
"""Number of client addresses of the bodies. One address may use at most half of --max-bodies-mib."""
NUM_TOKENS = 24
"""Number of tokens of each of the neighbour's answers."""
JSON = {"Content-Type": "application/json"}


def bodies() -> Mapping[str, tuple[str, bytes]]:
    """Return the route and the body of each kind. The bodies have exactly 1 MiB, and all are refused."""
    lists = b",".join([b"[" + b"12345," * 7999 + b"1]"] * 8)
    return {
        "a list of ones": ("/generate", _filled(b'{"prompt":[', b"1,", b"1]}")),
        "a list of tokens": ("/v1/completions", _filled(b'{"prompt":[', b"12345,", b"1]}")),
        "lists of tokens": ("/v1/completions", _padded(b'{"prompt":[' + lists + b'],"no_field":1}')),
        "a list of texts": ("/v1/completions", _filled(b'{"prompt":[', b'"a",', b'""]}')),
        "objects": ("/v1/chat/completions", _filled(b'{"messages":[', b'{"role":"user","content":"a"},', b"1]}")),
        "a text": ("/generate", _filled(b'{"prompt":"', b"The quick brown fox. ", b'"}')),
        "a shorter text": ("/generate", _padded(_filled(b'{"prompt":"', b"The quick brown fox. ", b'"}', MIB // 2))),
        "a message": ("/v1/chat/completions", _filled(b'{"messages":[{"role":"user","content":"', b"1234567 ", b'"}]}')),
        "no JSON": ("/generate", _filled(b'{"prompt":"', b"\\n", b'"')),
    }


def _filled(start: bytes, unit: bytes, end: bytes, num_bytes: int = MIB) -> bytes:
    return _padded(start + unit * ((num_bytes - len(start) - len(end)) // len(unit)) + end, num_bytes)


def _padded(body: bytes, num_bytes: int = MIB) -> bytes:
    return body + b" " * (num_bytes - len(body))


@dataclass(frozen=True, slots=True)
class Figures:
    """The neighbour's latencies in ms: the 95th percentile of the time to the first token, and the longest gap of tokens."""

    first_p95: float
    longest_gap: float
    num_answers: int


def stream(url: str, seconds: float) -> Figures:
    """Return the latencies of one client that requests short answers, one after the other, for `seconds`."""
    firsts: list[float] = []
    gaps: list[float] = []
    end = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=120) as client:
        while time.monotonic() < end:
            body = {"prompt": f"At {time.time()} the server said", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
            before, is_first = time.perf_counter(), True
            with client.stream("POST", "/generate", json=body) as reply:
                assert reply.status_code == 200, reply.read()
                for line in reply.iter_lines():
                    if line.startswith("data:"):
                        now = time.perf_counter()
                        (firsts if is_first else gaps).append(1e3 * (now - before))
                        before, is_first = now, False
    return Figures(percentile(firsts, 95), max(gaps), len(firsts))


def attack(url: str, path: str, body: bytes, ended: threading.Event, statuses: Counter[int]) -> None:
    """Send bodies one after the other until `ended` is set, on the same connection as far as the server keeps it open."""
    with httpx.Client(base_url=url, timeout=120) as client:
        while not ended.is_set():
            with suppress(httpx.TransportError):
                statuses[client.post(path, content=body, headers=JSON).status_code] += 1


def attack_main() -> None:
    """Run one attacking client, for a process of its own: `attack URL KIND SECONDS`."""
    _, _, url, kind, seconds = sys.argv
    path, body = bodies()[kind]
    ended, statuses = threading.Event(), Counter[int]()
    threading.Timer(float(seconds), ended.set).start()
    attack(url, path, body, ended, statuses)
    print(json.dumps(statuses))


def beside(url: str, kind: str, seconds: float) -> tuple[Figures, Counter[str]]:
    """Return the neighbour's figures while clients send bodies of `kind`, and the statuses of these clients' answers."""
    command = [sys.executable, "-m", "tests.bench.refused", "attack", url, kind, str(seconds + 2)]
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(NUM_CLIENTS)]
    time.sleep(2)
    figures = stream(url, seconds - 2)
    statuses: Counter[str] = Counter()
    for client in clients:
        output, _ = client.communicate()
        statuses.update(json.loads(output))
    return figures, statuses


def hold(port: int, address: str, body: bytes, num_sent: int, go_on: threading.Barrier) -> str:
    """Send the first `num_sent` bytes of a body from `address`, and the rest when all others have done so.

    Returns the status of the answer, "closed" or "reset".
    """
    with socket.create_connection(("127.0.0.1", port), timeout=120, source_address=(address, 0)) as connection:
        head = (
            f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with suppress(OSError):
            connection.sendall(head.encode() + body[:num_sent])
        go_on.wait()
        time.sleep(2)  # by then the server has received all that it accepts
        go_on.wait()
        with suppress(OSError):
            connection.sendall(body[num_sent:])
        try:
            return connection.recv(65536).partition(b" ")[2][:3].decode() or "closed"
        except OSError:
            return "reset"


def cost(url: str, kind: str, server: psutil.Process) -> float:
    """Return the server's CPU time for one body of `kind` in ms, without other load."""
    path, body = bodies()[kind]
    with httpx.Client(base_url=url, timeout=120) as client:
        client.post(path, content=body, headers=JSON)
        before = server.cpu_times()
        for _ in range(NUM_COSTED):
            client.post(path, content=body, headers=JSON)
        after = server.cpu_times()
    return 1e3 * (after.user + after.system - before.user - before.system) / NUM_COSTED


def fill(port: int, server: psutil.Process) -> tuple[float, float, Counter[str]]:
    """Send many bodies at once. Return the growth of the server's memory in MiB (peak, and afterwards), and the statuses."""
    _, body = bodies()["a text"]
    before, most, ended = server.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.is_set():
            most = max(most, server.memory_info().rss)
            time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    go_on = threading.Barrier(NUM_BODIES)
    with ThreadPoolExecutor(NUM_BODIES) as pool:
        addresses = [f"127.0.0.{2 + number % NUM_ADDRESSES}" for number in range(NUM_BODIES)]
        statuses = Counter(pool.map(lambda address: hold(port, address, body, len(body) - 1, go_on), addresses))
    ended.set()
    watching.join()
    return (most - before) / MIB, (server.memory_info().rss - before) / MIB, statuses


def run(url: str, port: int, server: psutil.Process, seconds: float, kinds: Sequence[str]) -> None:
    """Measure, and print a line for each kind of body."""
    stream(url, 3)
    quiet = stream(url, seconds)
    print(f"{'quiet':18} longest gap {quiet.longest_gap:7.1f} ms          first p95 {quiet.first_p95:7.1f} ms", flush=True)
    for kind in kinds:
        own_ms = cost(url, kind, server)
        figures, statuses = beside(url, kind, seconds)
        gap, first = figures.longest_gap / quiet.longest_gap, figures.first_p95 / quiet.first_p95
        answer_counts = ", ".join(f"{number} x {status}" for status, number in sorted(statuses.items()))
        times = f"longest gap {figures.longest_gap:7.1f} ms ({gap:4.1f} x) first p95 {figures.first_p95:7.1f} ms ({first:4.1f} x)"
        print(f"{kind:18} {times}; {own_ms:5.1f} ms of the server's cores for one; {answer_counts}", flush=True)
    most, after, statuses = fill(port, server)
    answer_counts = ", ".join(f"{number} x {status}" for status, number in sorted(statuses.items()))
    print(f"{NUM_BODIES} bodies of 1 MiB: {most:.0f} MiB at most, {after:.0f} MiB after them; {answer_counts}")


def main() -> None:
    """Start the server, run the benchmark, and end the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-cores", type=int, nargs="+", default=[0])
    parser.add_argument("--client-cores", default="1")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--kinds", nargs="*", choices=[*bodies()], default=[*bodies()])
    parser.add_argument("flags", nargs="*", help="of the server")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {int(core) for core in arguments.client_cores.split(",")})
    port = free_port()
    command = [sys.executable, "-m", "server", "--port", str(port), *arguments.flags]
    with tempfile.TemporaryDirectory() as folder:
        server = Program(command, arguments.server_cores, Path(folder) / "log", {})
        try:
            server.wait_until(lambda: answers(port, "/ready"))
            run(f"http://127.0.0.1:{port}", port, psutil.Process(server.process.pid), arguments.seconds, arguments.kinds)
        finally:
            server.end()


if __name__ == "__main__":
    attack_main() if sys.argv[1:2] == ["attack"] else main()
