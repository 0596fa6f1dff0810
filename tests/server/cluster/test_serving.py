"""`python -m server.cluster`: real replicas of the embedded model, on Ray Serve, over a socket."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.client import Client
from tests.server import live
from tests.server.keyed import ADMIN, bearer, write_keys
from tests.server.live import run_main, wait_until

pytestmark = pytest.mark.slow
REPLICA = "ray::ServeReplica:lori-server:Replica"
DEMO = Path("server/adapters")
FIELDS = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
PROMPT = "Question: What is 2 + 3?\nAnswer:"
ENDING_S = 120


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that answers, and what an admin sees of it."""

    url: str
    process: Popen[bytes]
    log: Path
    http: httpx.Client

    def by_replica(self, name: str, **labels: str) -> dict[str, float]:
        """Returns the sum of a metric's samples that have `labels`, by replica."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    replica = sample.labels["replica"]
                    found[replica] = found.get(replica, 0) + sample.value
        return found

    def replicas(self) -> list[psutil.Process]:
        """Returns the replicas' processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if child.is_running() and REPLICA in " ".join(child.cmdline())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    place = tmp_path_factory.mktemp("cluster")
    port, log = _free_port(), place / "log"
    (place / "adapters").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", str(_free_port()))
        patch.setattr(live, "LIMIT_S", 300)  # three processes import torch, one after the other
        flags = ["--port", str(port), "--replicas", "2", "--kv-cache-gib", "0.2", "--drain-s", "5"]
        flags += ["--keys", str(write_keys(place)), "--adapters", f"file://{place}/adapters"]
        flags += ["--adapter-cache", str(place / "cache"), "--delete-grace-s", "0.1"]
        process = run_main(log, *flags, module="server.cluster")
        try:
            wait_until(lambda: b"ready on" in log.read_bytes() or process.poll() is not None, "the cluster")
            assert process.poll() is None, log.read_text()
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, headers=bearer(ADMIN), timeout=60) as http:
                yield Cluster(url, process, log, http)
        finally:
            own = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            assert process.wait(ENDING_S) == 0, log.read_text()
            assert not [left for left in own if left.is_running() and left.status() != psutil.STATUS_ZOMBIE]


def _adapters_stay_with_their_replica(cluster: Cluster) -> None:
    names = ["math", "safety", "intent", "nlu"]
    for _ in range(5):
        for name in names:
            reply = cluster.http.post("/generate", json={"prompt": PROMPT, "adapter": name, "max_tokens": 2})
            assert reply.status_code == 200, reply.text
    for name in names:
        asked = cluster.by_replica("lori:adapter_requests_total", adapter=name)
        assert [number for number in asked.values() if number] == [5], name


def _a_merge_is_answered(cluster: Cluster) -> None:
    body = {"prompt": PROMPT, "adapter": ["math", "safety"], "weights": [1, 0.5], "max_tokens": 24}
    reply = cluster.http.post("/generate", json=body)
    assert "5" in reply.json()["text"]
    assert [of["name"] for of in reply.json()["adapter"]] == ["math", "safety"]


def _a_stream_comes_in_pieces(cluster: Cluster) -> None:
    with cluster.http.stream("POST", "/generate", json={"prompt": PROMPT, "adapter": "math", "stream": True}) as reply:
        events = re.findall(r"event: (\w+)", reply.read().decode())
    assert events[-1] == "done"
    assert events.count("token") > 3


def _a_client_that_leaves_frees_its_place(cluster: Cluster) -> None:
    body = {"prompt": PROMPT, "adapter": "math", "stream": True, "max_tokens": 4000, "ignore_eos": True}
    with cluster.http.stream("POST", "/generate", json=body) as reply:
        next(reply.iter_bytes())
        assert sum(cluster.by_replica("vllm:num_requests_running").values()) == 1
    wait_until(lambda: sum(cluster.by_replica("vllm:num_requests_running").values()) == 0, "the request to be cancelled")


def _what_is_wrong_is_refused_as_by_one_server(cluster: Cluster) -> None:
    reply = cluster.http.post("/generate", json={"prompt": PROMPT, "adapter": "maths"})
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "there is no adapter 'maths': did you mean 'math'?"
    assert httpx.post(f"{cluster.url}/generate", json={"prompt": PROMPT}).status_code == 401
    assert cluster.http.post("/generate", content=b"[" * 200_000).status_code == 400


def _a_change_reaches_every_replica(cluster: Cluster) -> None:
    files = {field: (DEMO / "math" / file).read_bytes() for field, file in FIELDS.items()}
    before = cluster.by_replica("lori:adapters_registered")
    assert len(before) == 2
    reply = cluster.http.post("/adapters", data={"name": "mine"}, files=files)
    assert reply.status_code == 201, reply.text
    assert cluster.by_replica("lori:adapters_registered") == {name: number + 1 for name, number in before.items()}
    assert cluster.http.post("/generate", json={"prompt": PROMPT, "adapter": ["mine", "safety"]}).status_code == 200
    assert cluster.http.delete("/adapters/mine").status_code == 200
    assert cluster.by_replica("lori:adapters_registered") == before
    assert cluster.http.post("/generate", json={"prompt": PROMPT, "adapter": "mine"}).status_code == 404
    assert cluster.http.delete("/adapters/mine").status_code == 404
    wait_until(lambda: not [*(cluster.log.parent / "adapters").rglob("*.safetensors")], "the files to go")


def _a_killed_replica_loses_no_request_that_had_not_begun_to_answer(cluster: Cluster) -> None:
    names = ["math", "safety", "intent", "nlu"]
    with ExitStack() as stack:
        client = stack.enter_context(Client(cluster.url, api_key=ADMIN, timeout_s=120, num_retries=5))
        pool = stack.enter_context(ThreadPoolExecutor(8))

        def ask(place: int) -> int:
            reply = client.generate(prompt=PROMPT, adapter=names[place % 4], max_tokens=16, ignore_eos=True)
            return reply.usage.completion_tokens

        asked = [pool.submit(ask, place) for place in range(48)]
        wait_until(lambda: sum(one.done() for one in asked) >= 4, "some answers")
        victim = cluster.replicas()[0]
        os.kill(victim.pid, signal.SIGKILL)
        assert [one.result(timeout=240) for one in asked] == [16] * 48
    wait_until(lambda: len(cluster.by_replica("lori:adapters_registered")) == 2, "another replica")
    assert victim.pid not in [replica.pid for replica in cluster.replicas()]


def test_two_replicas_serve_as_one_server(cluster: Cluster) -> None:
    """One test of several parts: a start takes half a minute, and processes that share the tests would each have one."""
    _adapters_stay_with_their_replica(cluster)
    _a_merge_is_answered(cluster)
    _a_stream_comes_in_pieces(cluster)
    _a_client_that_leaves_frees_its_place(cluster)
    _what_is_wrong_is_refused_as_by_one_server(cluster)
    _a_change_reaches_every_replica(cluster)
    _a_killed_replica_loses_no_request_that_had_not_begun_to_answer(cluster)
