"""Traces as a collector receives them, and the errors if they cannot be sent."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from lori.format import read_config
from lori.named_merge import MergedAdapter
from server.telemetry.tracing import TracingError, start_tracing
from tests.server.forked import start_forked
from tests.server.live import LIMIT_S, Live, run_main, wait_until
from tests.server.otlp import Collector, attributes, collector
from tests.server.rig import write_merge

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def heard() -> Iterator[Collector]:
    with collector() as received:
        yield received


@pytest.fixture(scope="module")
def traced(writer_model: Path, adapters: Path, heard: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    patch = pytest.MonkeyPatch()
    patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    flags = ["--model", str(writer_model), "--adapters", str(adapters), "--dtype", "float32", "--threads", "1"]
    flags += ["--kv-cache-gib", "0.01", "--otlp-traces-endpoint", heard.url, "--drain-notice-s", "0"]
    merges, config = tmp_path_factory.mktemp("merges"), read_config(adapters / "math").lori
    reference = f"math@{config.content_digest[:12]}"
    write_merge(merges, "half", config.base_digest, [MergedAdapter(reference=reference, weight=0.5, block_weights=[1.0, 2.0])])
    flags += ["--merges", str(merges)]
    with patch.context(), start_forked(tmp_path_factory.mktemp("traced") / "log", *flags) as live:
        patch.undo()
        yield live


def spans(heard: Collector, request_id: str) -> list[Span]:
    return [span for span in heard.spans if attributes(span).get("lori.request_id") == request_id]


def span(heard: Collector, request_id: str) -> Span:
    """Wait for the span of a request and return it. Fail if there are several."""
    wait_until(lambda: bool(spans(heard, request_id)), "the span")
    [one] = spans(heard, request_id)
    return one


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_is_one_span_of_its_client_s_trace(traced: Live, heard: Collector, is_stream: bool) -> None:
    name = f"mine-{is_stream}"
    body = {"prompt": "four", "max_tokens": 5, "adapter": ["math", "safety"], "weights": [1, 0.5], "temperature": 0.5}
    headers = {"x-request-id": name, "traceparent": f"00-{TRACE}-{PARENT}-01"}
    reply = traced.client.post("/generate", json=body | {"stream": is_stream}, headers=headers)
    assert reply.status_code == 200
    received = span(heard, name)
    assert received.trace_id.hex() == TRACE
    assert received.parent_span_id.hex() == PARENT
    assert received.kind == Span.SPAN_KIND_SERVER
    assert received.name == "POST /generate"
    values: dict[str, Any] = attributes(received)
    assert values["gen_ai.request.model"] == "tiny-writer"
    assert values["gen_ai.request.max_tokens"] == 5
    assert values["gen_ai.request.temperature"] == 0.5
    assert values["gen_ai.usage.input_tokens"] == 4
    assert values["gen_ai.usage.output_tokens"] == 5
    assert values["gen_ai.response.finish_reasons"] == ["length"]
    assert values["gen_ai.response.id"].startswith("gen-")
    assert [each.partition("@")[0] for each in values["lori.adapters"]] == ["math", "safety"]
    assert values["lori.weights"] == [1, 0.5]
    assert values["lori.merge"] == "linear"
    assert 0 < values["gen_ai.latency.time_to_first_token"] <= values["gen_ai.latency.e2e"]
    assert values["gen_ai.latency.time_in_queue"] >= 0
    assert (received.end_time_unix_nano - received.start_time_unix_nano) / 1e9 >= values["gen_ai.latency.e2e"]
    assert not [each for each in heard.spans if each.parent_span_id == received.span_id], "ASGI messages have no spans"


def test_the_span_has_the_named_merges(traced: Live, heard: Collector) -> None:
    body = {"prompt": "four", "max_tokens": 1, "adapter": "half"}
    traced.client.post("/generate", json=body, headers={"x-request-id": "merged"}).raise_for_status()
    values = attributes(span(heard, "merged"))
    assert (values["lori.named_merges"], values["lori.weights"], values["lori.block_weights"]) == (["half"], [0.5], ["1.0 2.0"])


def test_a_request_without_a_trace_begins_one(traced: Live, heard: Collector) -> None:
    traced.client.post("/generate", json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "first"})
    received = span(heard, "first")
    assert received.parent_span_id == b""
    assert f"trace_id='{received.trace_id.hex()}'" in traced.log.read_text()


def test_a_refusal_has_a_span_too(traced: Live, heard: Collector) -> None:
    traced.client.post("/generate", json={"prompt": "a", "adapter": "nobody"}, headers={"x-request-id": "refused"})
    received = span(heard, "refused")
    assert "gen_ai.response.id" not in attributes(received)
    assert 404 in attributes(received).values()


def test_a_client_that_leaves_ends_its_span(traced: Live, heard: Collector) -> None:
    body = {"prompt": "a", "max_tokens": 2000, "stream": True}
    with httpx.stream("POST", f"{traced.url}/generate", json=body, headers={"x-request-id": "left"}, timeout=LIMIT_S) as reply:
        lines = reply.iter_lines()
        next(lines)
    received = span(heard, "left")
    assert attributes(received)["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert received.status.code != Status.STATUS_CODE_ERROR


def test_the_collector_gets_our_service_name_and_no_probes(traced: Live, heard: Collector) -> None:
    for path in ("/health", "/ping", "/ready", "/metrics"):
        assert traced.client.get(path, headers={"x-request-id": "probe"}).status_code == 200
    traced.client.get("/adapters", headers={"x-request-id": "last"})
    span(heard, "last")
    assert not spans(heard, "probe")
    assert set(heard.paths) == {"/v1/traces"}
    assert heard.resources[0]["service.name"] == "lori-server"
    assert heard.resources[0]["deployment.environment.name"] == "test"


@pytest.mark.slow
def test_pending_spans_are_sent_at_the_end(writer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--model", str(writer_model), "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.01"]
    with collector() as heard:
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", heard.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        with start_forked(tmp_path / "log", *flags, "--drain-notice-s", "0") as live:
            live.generate(prompt="a", max_tokens=1)
            assert not heard.spans
            live.process.send_signal(signal.SIGTERM)
            assert live.process.wait(LIMIT_S) == 0
        assert [each.name for each in heard.spans] == ["POST /generate"]
        assert heard.resources[0]["service.name"] == "mine", "the environment takes precedence over our own name"


@pytest.mark.slow
def test_a_missing_collector_does_not_disturb_the_server(writer_model: Path, tmp_path: Path) -> None:
    flags = ["--model", str(writer_model), "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.01"]
    flags += ["--otlp-traces-endpoint", "http://127.0.0.1:9", "--drain-notice-s", "0"]
    with start_forked(tmp_path / "log", *flags) as live:
        live.generate(prompt="a", max_tokens=1)
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(LIMIT_S) == 0
        assert "Traceback" not in live.log.read_text()


@pytest.mark.parametrize("hidden", ["opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.instrumentation"])
def test_traces_without_their_packages_are_refused_at_start(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.telemetry.spans", raising=False)
    for name in [each for each in sys.modules if each.startswith(hidden)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(TracingError, match=r"^traces are asked for by OTEL_EXPORTER_OTLP_ENDPOINT, .* not installed: pip "):
        start_tracing(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"})


@pytest.mark.slow
def test_traces_that_cannot_be_sent_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    process = run_main(tmp_path / "log", "--otlp-traces-endpoint", "http://localhost:4317")
    assert process.wait(LIMIT_S) == 1
    [line] = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("error: OTEL_EXPORTER_OTLP_PROTOCOL: found 'grpc', expected 'http/protobuf'")


@pytest.mark.parametrize(
    ("endpoint", "environment"),
    [
        (None, {}),
        (None, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}),
    ],
)
def test_without_an_endpoint_nothing_is_traced(endpoint: str | None, environment: dict[str, str]) -> None:
    assert start_tracing(endpoint, environment) is None
