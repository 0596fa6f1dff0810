"""Clusters (`python -m server.cluster`) for tests, beside whatever else runs on this machine."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from server.affinity import key_of, ranked
from server.transport.sockets import free_port
from tests.server.live import run_main, wait_until

REPLICA, INGRESS = "ray::ServeReplica:lori-server:Replica", "ray::ServeReplica:lori-server:Ingress"
NAMES = ("math", "safety", "intent", "nlu")
START_S = 300
"""How long a cluster may take to start, or one more replica of it: processes import torch, one after the other."""
ENDING_S = 120


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that answers, with the view of an admin."""

    url: str
    process: Popen[bytes]
    log: Path
    http: httpx.Client

    def by_replica(self, name: str, **labels: str) -> dict[str, float]:
        """Return the sum of a metric's samples that have `labels`, by replica. Asks again if all replicas are late."""
        replies: list[httpx.Response] = []

        def is_answered() -> bool:
            replies.append(self.http.get("/metrics"))
            return replies[-1].status_code != httpx.codes.SERVICE_UNAVAILABLE

        wait_until(is_answered, "a replica to show its metrics")
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(replies[-1].raise_for_status().text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    replica = sample.labels["replica"]
                    sums[replica] = sums.get(replica, 0) + sample.value
        return sums

    def names(self) -> set[str]:
        """Return the replicas' names."""
        return set(self.by_replica("lori:adapters_registered"))

    def replicas(self) -> list[psutil.Process]:
        """Return the replicas' processes."""
        return processes_of(self.process.pid, REPLICA)

    def ingresses(self) -> list[psutil.Process]:
        """Return the ingresses' processes."""
        return processes_of(self.process.pid, INGRESS)


def processes_of(cluster: int, title: str) -> list[psutil.Process]:
    """Return the processes of `title`, `REPLICA` or `INGRESS`, of the cluster whose program has this number."""
    children = psutil.Process(cluster).children(recursive=True)
    return [child for child in children if child.is_running() and title in " ".join(child.cmdline())]


def adapters_of_each(replicas: set[str]) -> Mapping[str, Sequence[str]]:
    """Return, for each of `replicas`, one or two adapters whose requests go to it first."""
    pairs = [[one, other] for one in NAMES for other in NAMES if one <= other]
    first = {ranked(key_of(pair), replicas)[0]: sorted(set(pair)) for pair in pairs}
    assert first.keys() == replicas
    return first


@contextmanager
def running(log: Path, *flags: str, headers: Mapping[str, str] | None = None, within: Sequence[str] = ()) -> Iterator[Cluster]:
    """Run a cluster until the block ends. Checks that it exits with 0 and leaves no process. `within` is as for `run_main`."""
    port = free_port()
    flags = ("--port", str(port), "--kv-cache-gib", "0.2", *flags)
    process = run_main(log, *flags, module="server.cluster", within=within)
    try:
        wait_until(lambda: b"ready on" in log.read_bytes() or process.poll() is not None, "the cluster", START_S)
        assert process.poll() is None, log.read_text()
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
            yield Cluster(url, process, log, http)
    finally:
        own = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENDING_S) == 0, log.read_text()
        assert not [left for left in own if left.is_running() and left.status() != psutil.STATUS_ZOMBIE]
