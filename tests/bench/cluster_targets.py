"""Clusters as targets of a benchmark, and their metrics."""

import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from server.transport.sockets import free_port
from tests.bench.serve_asks import Ask
from tests.bench.serve_load import Send
from tests.bench.serve_processes import Program, answers
from tests.bench.serve_targets import Server, generate_document
from tests.bench.serve_wire import FailedError, Reply
from tests.server.cluster.running import REPLICA, processes_of

REQUESTS, REGISTERED = "lori:adapter_requests_total", "lori:adapters_registered"
END_S = 60


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running `python -m server.cluster` with all of its processes."""

    server: Server

    def by_adapter(self) -> Mapping[str, Mapping[str, float]]:
        """Return the number of requests answered, by adapter and by replica name."""
        counts: dict[str, dict[str, float]] = defaultdict(dict)
        for sample in self._samples(REQUESTS):
            counts[sample.labels["adapter"]][sample.labels["replica"]] = sample.value
        return counts

    def names(self) -> Collection[str]:
        """Return the names of the replicas that answer."""
        return {sample.labels["replica"] for sample in self._samples(REGISTERED)}

    def _samples(self, name: str) -> Iterator[Sample]:
        answer = httpx.get(f"http://127.0.0.1:{self.server.port}/metrics", timeout=END_S)
        families = text_string_to_metric_families(answer.text if answer.status_code == httpx.codes.OK else "")
        return (sample for family in families for sample in family.samples if sample.name == name)

    def replicas(self) -> Sequence[psutil.Process]:
        """Return the replicas' processes, in no particular order."""
        return processes_of(self.server.program.process.pid, REPLICA)

    def end(self) -> None:
        """Terminate the cluster and wait for its end."""
        self.server.program.process.terminate()
        self.server.program.process.wait(END_S)
        self.server.program.end()


def start_cluster(adapters: Path, num_replicas: int, cores: Sequence[int], log: Path, flags: Sequence[str]) -> Cluster:
    """Start a cluster on this machine with the adapters in a folder; each replica has one thread."""
    port = free_port()
    command = [sys.executable, "-m", "server.cluster", "--port", str(port), "--replicas", str(num_replicas), "--threads", "1"]
    command += ["--no-demo-adapters", "--adapters", str(adapters), "--drain-s", "1", *flags]
    cluster = Cluster(Server(Program(command, cores, log, {}), port, generate_document))
    try:
        cluster.server.program.wait_until(lambda: b"ready on" in log.read_bytes() and answers(port, "/ready"))
    except BaseException:
        cluster.end()
        raise
    return cluster


def whole_send(server: Server) -> Send:
    """Return a function that requests whole answers from `server`."""

    async def send(ask: Ask) -> Reply:
        # Without verify=False every client would read the certificates again, at the cost of what is measured.
        path, document = server.translate(ask)
        reply = Reply()
        async with httpx.AsyncClient(timeout=None, verify=False) as http:
            answer = await http.post(f"http://127.0.0.1:{server.port}{path}", json=document | {"stream": False})
        if answer.status_code != httpx.codes.OK:
            raise FailedError(f"POST {path}: {answer.status_code}: {answer.text}")
        reply.num_completion = answer.json()["usage"]["completion_tokens"]
        return reply

    return send
