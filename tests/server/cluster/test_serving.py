"""`python -m server.cluster`: real replicas of the embedded model, on Ray Serve, over a socket."""

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.client import BrokenStreamError, Client, DoneData, StreamEvent
from server.client.fields import GenerateFields
from server.transport.sockets import free_port
from tests.server.cluster.running import ENDING_S, NAMES, START_S, Cluster, processes_of, running
from tests.server.framing import CASES, ask, check, check_proxied
from tests.server.keyed import ACME, ADMIN, bearer, write_keys
from tests.server.live import LIMIT_S, run_main, wait_until
from tests.server.otlp import Collector, attributes, collector

pytestmark = pytest.mark.cluster
DEMO = Path("server/adapters")
FIELDS = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
SILENCE_S = "10"
PROMPT = "Question: What is 2 + 3?\nAnswer:"
PER_MINUTE = 6


@pytest.fixture(scope="module")
def traces() -> Iterator[Collector]:
    with collector() as traces:
        yield traces


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, traces: Collector) -> Iterator[Cluster]:
    place = tmp_path_factory.mktemp("cluster")
    for folder in ("adapters", "merges"):
        (place / folder).mkdir()
    flags = ["--replicas", "2", "--drain-s", "120", "--keys", str(write_keys(place, f"requests_per_minute = {PER_MINUTE}"))]
    flags += ["--adapters", f"file://{place}/adapters", "--adapter-cache", str(place / "cache"), "--delete-grace-s", "0.1"]
    flags += ["--merges", str(place / "merges"), "--max-body-bytes", str(5 << 20)]
    flags += ["--keep-alive-s", SILENCE_S, "--max-body-s", SILENCE_S, "--max-unread-s", SILENCE_S]
    flags += ["--otlp-traces-endpoint", traces.url, "--drain-notice-s", "4"]
    with running(place / "log", *flags, headers=bearer(ADMIN)) as cluster:
        yield cluster


def _adapters_stay_with_their_replica(cluster: Cluster) -> None:
    for _ in range(5):
        for name in NAMES:
            reply = cluster.http.post("/generate", json={"prompt": PROMPT, "adapter": name, "max_tokens": 2})
            assert reply.status_code == 200, reply.text
    for name in NAMES:
        asked = cluster.by_replica("lori:adapter_requests_total", adapter=name)
        assert [number for number in asked.values() if number] == [5], name
    # Ray once logged lines that differ in numbers alone as one line.
    wait_until(lambda: cluster.log.read_text().count("POST /generate 200") == 20, "a line of the log for each request")
    lines = [line for line in cluster.log.read_text().splitlines() if "POST /generate" in line]
    assert {
        match[1] for line in lines if (match := re.match(r"INFO server.request: .* replica='(\w+)'", line))
    } <= cluster.names()
    assert all("replica='" in line for line in lines)


def _a_merge_is_answered(cluster: Cluster) -> None:
    body = {"prompt": PROMPT, "adapter": ["math", "safety"], "weights": [1, 0.5], "max_tokens": 24}
    reply = cluster.http.post("/generate", json=body)
    assert "5" in reply.json()["text"]
    assert [term["name"] for term in reply.json()["adapter"]] == ["math", "safety"]


def _a_stream_comes_in_pieces(cluster: Cluster) -> None:
    body = {"prompt": PROMPT, "adapter": "math", "max_tokens": 8, "ignore_eos": True, "stream": True}
    with cluster.http.stream("POST", "/generate", json=body) as reply:
        events = re.findall(r"event: (\w+)", reply.read().decode())
    assert events[-1] == "done"
    assert events.count("token") > 3


def _a_client_that_leaves_frees_its_place(cluster: Cluster) -> None:
    body = {"prompt": PROMPT, "adapter": "math", "stream": True, "max_tokens": 4000, "ignore_eos": True}
    with cluster.http.stream("POST", "/generate", json=body) as reply:
        parts = reply.iter_bytes()  # held, because dropping the iterator would close the connection
        next(parts)
        wait_until(lambda: sum(cluster.by_replica("vllm:num_requests_running").values()) == 1, "the request to run")
    wait_until(lambda: sum(cluster.by_replica("vllm:num_requests_running").values()) == 0, "the request to be cancelled")
    # Also a client that waits for a whole answer: HAProxy once did not notice that it left.
    with pytest.raises(httpx.ReadTimeout):
        cluster.http.post("/generate", json=body | {"stream": False}, timeout=2)
    wait_until(lambda: sum(cluster.by_replica("vllm:num_requests_running").values()) == 0, "the request to be cancelled")


def _a_connection_without_whole_headers_is_ended(cluster: Cluster) -> None:
    address = httpx.URL(cluster.url)
    with socket.create_connection((address.host, address.port), LIMIT_S) as connection:
        connection.sendall(b"GET /ready HT")
        assert connection.recv(1 << 10).startswith(b"HTTP/1.1 408 ")


def _a_request_is_answered_once_by_proxy_and_ingress(cluster: Cluster) -> None:
    """Regression: after an offer to upgrade, the ingress took a body for a request, and its answer went to another client."""
    assert {case.name for case in CASES if b"upgrade" in case.content.lower()}
    (ingress,) = {one.laddr.port for one in cluster.ingresses()[0].net_connections() if _is_http(one)}
    for way in ("whole", "cut"):
        for case in CASES:
            check_proxied(case, ask(httpx.URL(cluster.url).port or 0, case, way, ADMIN.encode()))
            check(case, ask(ingress, case, way, ADMIN.encode()))


def _is_http(connection: Any) -> bool:
    # Ray listens for its own messages on all addresses.
    return bool(connection.status == psutil.CONN_LISTEN and connection.laddr.ip == "127.0.0.1")


def _wrong_requests_are_refused_as_by_one_server(cluster: Cluster) -> None:
    reply = cluster.http.post("/generate", json={"prompt": PROMPT, "adapter": "maths"})
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "there is no adapter 'maths': did you mean 'math'?"
    assert httpx.post(f"{cluster.url}/generate", json={"prompt": PROMPT}).status_code == 401
    assert cluster.http.post("/generate", content=b"[" * 200_000).status_code == 400


def _a_tenant_s_rate_is_that_of_one_server(cluster: Cluster) -> None:
    """Regression: each replica counted for itself, so two of them allowed twice the rate."""

    def ask(number: int) -> int:
        body = (
            {"prompt": [PROMPT] * 2, "max_tokens": 1} if number == 0 else {"prompt": PROMPT, "max_tokens": 1, "adapter": "nobody"}
        )
        return httpx.post(f"{cluster.url}/v1/completions", json=body, headers=bearer(ACME), timeout=LIMIT_S).status_code

    start = time.monotonic()
    statuses = [ask(number) for number in range(2 * PER_MINUTE)]
    num_minutes = 1 + int((time.monotonic() - start) / 60)
    assert statuses[: PER_MINUTE - 1] == [200, *[400] * (PER_MINUTE - 2)]
    assert len(statuses) - statuses.count(429) <= num_minutes * PER_MINUTE - 1, "the batch counts twice"


def _long_bodies_pass_both_ways(cluster: Cluster) -> None:
    """Regression: for more than gRPC's 4 MiB a client got an error of the server."""
    form = {"Content-Type": "multipart/form-data; boundary=none"}
    reply = cluster.http.post("/adapters", content=b"x" * (5 << 20), headers=form)
    assert reply.status_code == 400, reply.text
    reply = cluster.http.post("/tokenize", json={"prompt": f" {'=' * 65}" * 65_000, "return_token_strs": True})
    assert reply.status_code == 200, reply.text
    assert len(reply.content) > 4 << 20


def _a_request_is_one_span_of_its_client_s_trace(cluster: Cluster, traces: Collector) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"prompt": PROMPT, "adapter": "safety", "max_tokens": 3, "ignore_eos": True}
    reply = cluster.http.post("/generate", json=body, headers={"traceparent": f"00-{trace}-{parent}-01"})
    assert reply.status_code == 200, reply.text
    wait_until(lambda: any(span.trace_id.hex() == trace for span in traces.spans), "its span")
    (span,) = [span for span in traces.spans if span.trace_id.hex() == trace]
    assert span.parent_span_id.hex() == parent
    assert attributes(span)["gen_ai.usage.output_tokens"] == 3


def _a_change_reaches_every_replica(cluster: Cluster) -> None:
    before = cluster.by_replica("lori:adapters_registered")
    assert len(before) == 2
    _upload(cluster, "mine")
    assert cluster.by_replica("lori:adapters_registered") == {name: number + 1 for name, number in before.items()}
    assert cluster.http.post("/generate", json={"prompt": PROMPT, "adapter": ["mine", "safety"]}).status_code == 200
    _a_merge_reaches_every_replica(cluster)
    assert cluster.http.delete("/adapters/mine").status_code == 200
    assert cluster.by_replica("lori:adapters_registered") == before
    assert cluster.http.post("/generate", json={"prompt": PROMPT, "adapter": "mine"}).status_code == 404
    assert cluster.http.delete("/adapters/mine").status_code == 404
    wait_until(lambda: not [*(cluster.log.parent / "adapters").rglob("*.safetensors")], "the files to go")


def _a_merge_reaches_every_replica(cluster: Cluster) -> None:
    _publish_sum(cluster, "mine")
    assert _statuses_of_sum(cluster) == {200}
    assert cluster.http.delete("/merges/sum").status_code == 200
    assert _statuses_of_sum(cluster) == {404}
    assert cluster.http.delete("/merges/sum").status_code == 404


def _publish_sum(cluster: Cluster, name: str) -> None:
    """Publish the merge `sum` of the adapter `name` and `safety`."""
    details = [cluster.http.get(f"/adapters/{one}").raise_for_status().json() for one in (name, "safety")]
    config = json.loads((DEMO / "math" / FIELDS["config"]).read_text())
    adapters = [{"reference": f"{one['name']}@{one['version']}", "weight": 0.5} for one in details]
    body = {"base_digest": config["lori"]["base_digest"], "adapters": adapters}
    reply = cluster.http.put("/merges/sum", json=body)
    assert reply.status_code == 200, reply.text


def _statuses_of_sum(cluster: Cluster) -> set[int]:
    """Return the statuses of eight requests for the merge `sum`, of which each of two replicas almost surely gets some."""
    body = {"prompt": PROMPT, "max_tokens": 1}
    # The names decide which replica gets the request.
    named = [["sum", *names] for number in range(4) for names in combinations(("nlu", "intent", "math"), number)]
    bodies = [body | {"adapter": names, "weights": [1] * len(names)} for names in named]
    return {cluster.http.post("/generate", json=one).status_code for one in bodies}


def _adapters_are_shown_with_the_figures_of_all_replicas(cluster: Cluster) -> None:
    """Regression: a replica showed only its own view: most adapters on disk, and never used."""
    shown = {row["name"]: row for row in cluster.http.get("/adapters").raise_for_status().json()["adapters"]}
    assert all(shown[name]["num_requests"] >= 5 and shown[name]["tier"] == "resident" for name in NAMES)
    for name in NAMES:
        one = cluster.http.get(f"/adapters/{name}").raise_for_status().json()
        assert one["num_requests"] == shown[name]["num_requests"]


def _upload(cluster: Cluster, name: str) -> None:
    files = {field: (DEMO / "math" / file).read_bytes() for field, file in FIELDS.items()}
    reply = cluster.http.post("/adapters", data={"name": name}, files=files)
    assert reply.status_code == 201, reply.text


def _another_program_leaves_the_running_cluster_alone(cluster: Cluster) -> None:
    """Regression: the other program took over the address and, as it ended, ended the other applications on the same Ray."""
    (raylet,) = processes_of(cluster.process.pid, "raylet/raylet")
    (address,) = (flag.partition("=")[2] for flag in raylet.cmdline() if flag.startswith("--gcs-address="))
    log = cluster.log.parent / "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        process = run_main(log, "--ray-address", address, "--port", str(free_port()), module="server.cluster")
    try:
        assert process.wait(START_S) == 1, log.read_text()
    finally:
        process.kill()
    assert f"error: Ray Serve runs already on the Ray at {address}, " in log.read_text()
    assert cluster.http.get("/ready").status_code == 200
    assert len(cluster.names()) == 2


def _ask(client: Client, place: int) -> int | None:
    """Return the number of tokens of an answer, or None for a stream that broke after it had begun."""
    fields: GenerateFields = {"prompt": PROMPT, "adapter": NAMES[place % 4], "max_tokens": 16, "ignore_eos": True}
    if place % 2:
        return client.generate(**fields).usage.completion_tokens
    events: list[StreamEvent] = []
    try:
        for event in client.stream(**fields):
            events.append(event)  # one by one, to have the events before an error, too
    except BrokenStreamError:
        assert events, "a stream that had not begun was lost"
        return None
    (done,) = [event for event in events if isinstance(event, DoneData)]
    return done.usage.completion_tokens


def _a_killed_replica_loses_no_request_that_had_not_begun_to_answer(cluster: Cluster) -> None:
    """Kill a replica, and check that the new one in its place knows of all changes.

    Regression: the new replica had no pins, so it deleted an adapter that the others refused to delete; and it answered that
    adapters published during its start do not exist.
    """
    _upload(cluster, "kept")
    assert cluster.http.post("/adapters/kept/pin").status_code == 200
    _publish_sum(cluster, "kept")
    before, num_late = cluster.names(), 0
    with ExitStack() as stack:
        client = stack.enter_context(Client(cluster.url, api_key=ADMIN, timeout_s=120, num_retries=5))
        pool = stack.enter_context(ThreadPoolExecutor(8))
        asked = [pool.submit(_ask, client, place) for place in range(48)]
        wait_until(lambda: sum(one.done() for one in asked) >= 4, "some answers")
        victim = cluster.replicas()[0]
        victim.kill()
        while len(cluster.names() & before) == 2 or len(cluster.names()) < 2:
            _upload(cluster, f"late-{num_late}")
            num_late += 1
            time.sleep(0.2)  # the next one wants the processor, too
        results = [one.result(timeout=240) for one in asked]
    assert set(results[1::2]) == {16}
    assert set(results[::2]) <= {16, None}
    assert results.count(None) <= 8, "no more than ran"
    assert victim.pid not in [replica.pid for replica in cluster.replicas()]
    for number in range(num_late):
        reply = cluster.http.post("/generate", json={"prompt": PROMPT, "adapter": f"late-{number}", "max_tokens": 1})
        assert reply.status_code == 200, reply.text
    registered = len(NAMES) + 1 + num_late
    wait_until(lambda: [*cluster.by_replica("lori:adapters_registered").values()] == [registered] * 2, "both to know all")
    wait_until(lambda: [*cluster.by_replica("lori:adapters_pinned").values()] == [1, 1], "both to pin")
    assert _statuses_of_sum(cluster) == {200}
    assert cluster.http.delete("/merges/sum").status_code == 200
    assert cluster.http.delete("/adapters/kept").status_code == 409
    assert cluster.http.get("/adapters/kept").json()["is_pinned"]
    assert cluster.http.post("/adapters/kept/unpin").status_code == 200
    for name in ("kept", *(f"late-{number}" for number in range(num_late))):
        assert cluster.http.delete(f"/adapters/{name}").status_code == 200
    assert [*cluster.by_replica("lori:adapters_registered").values()] == [len(NAMES)] * 2


def _a_killed_ingress_loses_no_request_of_our_client(cluster: Cluster) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(Client(cluster.url, api_key=ADMIN, timeout_s=120, num_retries=12))
        pool = stack.enter_context(ThreadPoolExecutor(8))
        asked = [pool.submit(client.generate, prompt=PROMPT, adapter="math", max_tokens=32, ignore_eos=True) for _ in range(24)]
        wait_until(lambda: sum(one.done() for one in asked) >= 4, "some answers")
        (victim,) = cluster.ingresses()
        victim.kill()
        assert [one.result(timeout=240).usage.completion_tokens for one in asked] == [32] * 24
    wait_until(lambda: [one.pid for one in cluster.ingresses()] not in ([], [victim.pid]), "another ingress", START_S)


def _running_requests_end_before_the_cluster_does(cluster: Cluster, traces: Collector) -> None:
    """End the cluster during an answer. For the time of the notice, /ready answers 503 and requests are still taken.

    Regression: HAProxy was ended at once, which broke off every answer, and the spans of the last seconds were lost.
    """
    body = {"prompt": PROMPT, "adapter": "math", "stream": True, "max_tokens": 1000, "ignore_eos": True}
    trace = "1af7651916cd43dd8448eb211c80319c"
    parent = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    with cluster.http.stream("POST", "/generate", json=body, headers=parent) as reply:
        parts = reply.iter_text()
        text = next(parts)
        cluster.process.send_signal(signal.SIGTERM)
        wait_until(lambda: cluster.http.get("/ready").status_code == 503, "the notice")
        last = cluster.http.post("/generate", json={"prompt": PROMPT, "adapter": "math", "max_tokens": 2})
        assert last.status_code == 200, last.text
        text += next(parts)
        wait_until(lambda: b"no request is taken any more" in cluster.log.read_bytes(), "the end of the notice")
        wait_until(lambda: cluster.http.post("/generate", json=body).status_code == 503, "a refusal")
        refused = cluster.http.post("/generate", json=body)
        assert refused.json()["error"]["message"] == "the server is about to end"
        assert cluster.http.delete("/adapters/math").status_code == 503
        assert cluster.http.get("/health").status_code == 200
        text += "".join(parts)
    assert re.findall(r"event: (\w+)", text)[-1] == "done"
    assert cluster.process.wait(ENDING_S) == 0
    assert trace in {span.trace_id.hex() for span in traces.spans}


def _the_cluster_answers_as_one_server(cluster: Cluster, traces: Collector) -> None:
    _adapters_stay_with_their_replica(cluster)
    _a_merge_is_answered(cluster)
    _a_stream_comes_in_pieces(cluster)
    _a_client_that_leaves_frees_its_place(cluster)
    _a_request_is_answered_once_by_proxy_and_ingress(cluster)
    _wrong_requests_are_refused_as_by_one_server(cluster)
    _a_tenant_s_rate_is_that_of_one_server(cluster)
    _long_bodies_pass_both_ways(cluster)
    _a_request_is_one_span_of_its_client_s_trace(cluster, traces)
    _a_change_reaches_every_replica(cluster)
    _adapters_are_shown_with_the_figures_of_all_replicas(cluster)


def test_two_replicas_serve_as_one_server(cluster: Cluster, traces: Collector) -> None:
    """Run several parts in one test: a start takes half a minute, and each process that shares the tests would need its own."""
    with ThreadPoolExecutor(1) as pool:
        silent = pool.submit(_a_connection_without_whole_headers_is_ended, cluster)
        _the_cluster_answers_as_one_server(cluster, traces)
        silent.result()
    _another_program_leaves_the_running_cluster_alone(cluster)
    _a_killed_replica_loses_no_request_that_had_not_begun_to_answer(cluster)
    _a_killed_ingress_loses_no_request_of_our_client(cluster)
    _running_requests_end_before_the_cluster_does(cluster, traces)


def test_a_cluster_that_cannot_start_says_why(tmp_path: Path, writer_model: Path) -> None:
    """Regression: the error was that a deployment could not be updated, under a traceback."""
    flags = ["--port", str(free_port()), "--kv-cache-gib", "0.01", "--adapters", f"file://{tmp_path}/none"]
    flags += ["--model", str(writer_model), "--dtype", "float32", "--threads", "1"]
    process = run_main(tmp_path / "log", *flags, module="server.cluster")
    assert process.wait(START_S) == 1
    output = (tmp_path / "log").read_text()
    assert f"\nerror: --adapters file://{tmp_path}/none: there is no such folder\n" in output
    assert "Traceback" not in output
