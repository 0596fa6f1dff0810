"""Two Ray nodes, one of which is cut off, comes back, dies, and is replaced: each in a network namespace of its own."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import TypeVar

import pytest

from server.client import BrokenStreamError, Client
from server.cluster.environment import PREFERRED
from tests.server.cluster.namespaces import Machine, two_machines
from tests.server.cluster.running import START_S, Cluster, adapters_of_each, running
from tests.server.live import wait_until

pytestmark = pytest.mark.cluster
PROMPT = "Question: What is 2 + 3?\nAnswer:"
PORT = 6379
"""Ray's port. Each namespace has ports of its own."""
LONG, WHOLE = 6000, 256
"""Tokens of a stream that outlasts the loss of a machine, and of a request that is under way during the loss."""
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Nodes:
    """A cluster on two machines, seen from the first one, which gets the requests."""

    head: Machine
    other: Machine
    cluster: Cluster
    threads: ThreadPoolExecutor
    client: Client
    is_over: Event = field(default_factory=Event)
    """Set to end the streams that are being read."""

    def see(self, question: Callable[[], Result]) -> Result:
        """Return the answer to `question`, asked on the first machine."""
        return self.threads.submit(question).result()

    def names(self) -> set[str]:
        """Return the names of the replicas that answer."""
        return self.see(self.cluster.names)

    def have_each(self, number: int) -> bool:
        """Return whether two replicas have at least `number` requests under way each."""
        running = self.see(lambda: self.cluster.by_replica("vllm:num_requests_running"))
        return len(running) == 2 and min(running.values()) >= number

    def ask(self, adapters: Sequence[str]) -> "Future[float]":
        """Send a request. The result is the time of the answer."""

        def asked() -> float:
            reply = self.client.generate(prompt=PROMPT, adapter=adapters, max_tokens=WHOLE, ignore_eos=True)
            assert reply.usage.completion_tokens == WHOLE
            return time.monotonic()

        return self.threads.submit(asked)

    def stream(self, adapters: Sequence[str], has_begun: Event) -> "Future[float | None]":
        """Read a stream, and set `has_begun` when it begins. The result is the time when it broke, None if it did not."""

        def read() -> float | None:
            with closing(self.client.stream(prompt=PROMPT, adapter=adapters, max_tokens=LONG, ignore_eos=True)) as events:
                try:
                    for _ in events:
                        has_begun.set()
                        if self.is_over.is_set():
                            return None
                except BrokenStreamError:
                    return time.monotonic()
                return math.nan

        return self.threads.submit(read)


def _start_ray(machine: Machine, folder: Path, *flags: str) -> None:
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 32, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # Ray declares a machine dead that misses so many checks, 13 s each: five of them are a minute, and busy CPUs take that long.
    own |= {"RAY_health_check_failure_threshold": "20"}
    command = [Path(sys.executable).parent / "ray", "start", *flags, "--node-ip-address", machine.address, "--num-cpus", "1"]
    command += ["--object-store-memory", str(100 << 20), "--temp-dir", folder]
    done = subprocess.run([*machine.within, *command], env=os.environ | PREFERRED | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _join(head: Machine, other: Machine, folder: Path) -> None:
    _start_ray(other, folder, "--address", f"{head.address}:{PORT}")


@contextmanager
def _nodes(place: Path, folder: Path) -> Iterator[Nodes]:
    with ExitStack() as stack:
        head, other = stack.enter_context(two_machines("nodes"))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "t" * 32)
        _start_ray(head, folder, "--head", "--port", str(PORT), "--include-dashboard", "false")
        _join(head, other, folder)
        flags = ["--ray-address", f"{head.address}:{PORT}", "--replicas", "2", "--threads", "1", "--drain-s", "5"]
        cluster = stack.enter_context(running(place / "log", *flags, within=head.within))
        client = stack.enter_context(Client(cluster.url, timeout_s=240, num_retries=5))
        nodes = Nodes(head, other, cluster, stack.enter_context(head.threads(16)), client)
        stack.callback(nodes.is_over.set)
        yield nodes


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder for Ray's sockets, whose paths may have 107 characters."""
    place = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def _reach_both(nodes: Nodes, by_replica: Mapping[str, Sequence[str]]) -> None:
    """Send requests until each replica answers for its adapters. After a cut Ray's own channel opens some seconds later."""

    def num_answered(replica: str) -> float:
        return nodes.see(lambda: nodes.cluster.by_replica("lori:adapter_requests_total")).get(replica, 0)

    def answers(replica: str) -> bool:
        before = num_answered(replica)
        nodes.see(lambda: nodes.client.generate(prompt=PROMPT, adapter=by_replica[replica], max_tokens=1))
        return num_answered(replica) > before

    for replica in by_replica:
        wait_until(partial(answers, replica), f"{replica} to answer for its adapters")


def _lose_the_other(nodes: Nodes, loss: str, lose: Callable[[], None]) -> None:
    """Lose a machine under load. The other one answers all requests except a stream that had begun; its own stream goes on."""
    by_replica = adapters_of_each(nodes.names())
    _reach_both(nodes, by_replica)
    nodes.is_over.clear()
    begun = {replica: Event() for replica in by_replica}
    streams = [nodes.stream(adapters, begun[replica]) for replica, adapters in by_replica.items()]
    asked = [nodes.ask(adapters) for adapters in by_replica.values() for _ in range(3)]
    # A stream that has not begun yet would be answered by another replica from the start.
    wait_until(lambda: all(one.is_set() for one in begun.values()), "the streams to begin")
    wait_until(lambda: nodes.have_each(2), "a stream and a request under way on each machine")
    lose()
    lost = time.monotonic()
    asked += [nodes.ask(adapters) for adapters in by_replica.values()]
    answered = max(one.result(timeout=240) for one in asked) - lost
    wait_until(lambda: any(one.done() for one in streams), "a stream to break")
    nodes.is_over.set()
    (broke,) = [end - lost for one in streams if (end := one.result()) is not None]
    print(f"{loss}: all answered after {answered:.1f} s, the stream broken after {broke:.1f} s")


def _cut_off_while_nothing_is_sent(nodes: Nodes) -> None:
    """Wait for whole answers alone: a connection that sends nothing would never notice by itself that the peer is gone."""
    asked = [nodes.ask(adapters) for adapters in adapters_of_each(nodes.names()).values()]
    wait_until(lambda: nodes.have_each(1), "a request under way on each machine")
    nodes.other.plug("down")
    lost = time.monotonic()
    answered = max(one.result(timeout=240) for one in asked) - lost
    print(f"cut off in silence: all answered after {answered:.1f} s")


@pytest.mark.needs("network-namespaces")
def test_requests_outlive_a_machine(tmp_path: Path, folder: Path) -> None:
    """Run several parts in one test, because a start takes a minute."""
    with _nodes(tmp_path, folder) as nodes:
        first = nodes.names()
        assert len(first) == 2
        _cut_off_while_nothing_is_sent(nodes)
        nodes.other.plug("up")
        # The same names: everything was answered, and Ray did not declare the machine dead.
        wait_until(lambda: nodes.names() == first, "the machine that was cut off")
        _lose_the_other(nodes, "cut off", lambda: nodes.other.plug("down"))
        nodes.other.plug("up")
        wait_until(lambda: nodes.names() == first, "the machine that was cut off")
        _lose_the_other(nodes, "killed", nodes.other.kill)
        assert len(nodes.names()) == 1
        _join(nodes.head, nodes.other, folder)
        wait_until(lambda: len(nodes.names()) == 2, "another replica on the machine that came back", START_S)
        assert len(nodes.names() & first) == 1
