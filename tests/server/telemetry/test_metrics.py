"""The metrics of requests and adapters; a client cannot add labels to them."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from server.engine.adapters.cache import AdapterCache
from server.engine.adapters.registry import Registry
from server.engine.adapters.residents import Residents
from server.engine.request import AdapterTerm, DoneEvent, ErrorEvent, Request, Sequence, TextEvent, Timings
from server.engine.scheduling.scheduler import Scheduler
from server.telemetry.account import Account
from server.telemetry.gauges import _request_models, make_metrics
from server.telemetry.metrics import MAX_LISTED, Metrics
from tests.server.fake_service import served
from tests.server.live import Live
from tests.server.rig import FakeEngine, request

INFO = "vllm:lora_requests_info"


def samples(text: str, name: str) -> list[dict[str, str]]:
    return [s.labels for f in text_string_to_metric_families(text) for s in f.samples if s.name == name]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(metrics.text().decode())
    [number] = [s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
    return number


@contextmanager
def generating(live: Live, letter: str, adapter: object) -> Iterator[None]:
    """Keep the server generating until the block ends, with half of its memory."""
    body = {"prompt": letter * 2500, "adapter": adapter, "stream": True, "max_tokens": 1500}
    with live.client.stream("POST", "/generate", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        yield


def test_vllm_s_metrics_have_its_labels(live: Live) -> None:
    live.generate(prompt="a", max_tokens=2)
    text = live.client.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_count",
        "vllm:request_prefill_time_seconds_count",
        "vllm:request_decode_time_seconds_count",
    ):
        assert samples(text, name) == [{"model_name": "tiny-writer", "engine": "0"}], name
    reasons = {labels["finished_reason"] for labels in samples(text, "vllm:request_success_total")}
    assert reasons == {"stop", "length", "abort", "error"}


def test_running_and_waiting_requests_are_listed_by_adapter(live: Live) -> None:
    """Check the one, current sample from which the gateways of Kubernetes read where each adapter is."""
    live.wait_for(running=0, waiting=0)
    [idle] = samples(live.client.get("/metrics").text, INFO)
    assert idle == {"max_lora": "1024", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    before = live.metric(INFO)
    with generating(live, "a", ["safety", "math"]), generating(live, "b", "math"):
        # There is no memory for a third request.
        thread = threading.Thread(
            target=lambda: live.client.post("/generate", json={"prompt": "c" * 3600, "adapter": "intent", "max_tokens": 1})
        )
        thread.start()
        live.wait_for(running=2, waiting=1)
        [busy] = samples(live.client.get("/metrics").text, INFO)
        assert busy == {"max_lora": "1024", "running_lora_adapters": "math,safety,safety+math", "waiting_lora_adapters": "intent"}
        assert live.metric(INFO) > before > 1.7e9, "the value is the time"
    thread.join()
    live.wait_for(running=0, waiting=0)


def test_tokens_and_merges_are_counted_by_adapter(live: Live) -> None:
    live.wait_for(running=0, waiting=0)
    names = {"adapter": "safety"}

    def numbers() -> list[float]:
        return [
            live.metric("lori:adapter_requests_total", **names),
            live.metric("lori:adapter_tokens_total", kind="prompt", **names),
            live.metric("lori:adapter_tokens_total", kind="generated", **names),
            live.metric("lori:merge_terms_bucket", le="1.0"),
            live.metric("lori:merge_terms_bucket", le="2.0"),
            live.metric("lori:merge_terms_sum"),
            live.metric("lori:http_requests_total", route="/generate", status="200"),
        ]

    before = numbers()
    for adapter in (None, "safety", ["math", "safety"]):
        live.generate(prompt="four", max_tokens=5, adapter=adapter)
    assert [now - then for now, then in zip(numbers(), before, strict=True)] == [2, 8, 10, 2, 3, 3, 3]
    resident = {labels["adapter"] for labels in samples(live.client.get("/metrics").text, "lori:adapter_resident")}
    assert resident == {"intent", "math", "safety"}
    assert live.metric("lori:adapter_resident", adapter="safety") == 1
    assert live.metric("lori:requests_under_way") == 0


def test_no_label_holds_text_of_a_client(live: Live) -> None:
    """Send one text in many places. If it became a label, any client could fill the memory of the server and of Prometheus."""
    sent = "cardinality"
    live.client.post("/generate", json={"prompt": "x", "adapter": sent})
    live.client.post("/generate", json={"prompt": "x", "template": sent})
    live.client.get(f"/{sent}", params={sent: sent}, headers={sent: sent, "x-request-id": sent})
    live.client.request("PROPFIND", "/health")
    live.client.get(f"/static/{sent}")
    live.client.get("/health", headers={"Host": sent})
    text = live.client.get("/metrics").text
    assert sent not in text
    assert "PROPFIND" not in text
    assert {labels["route"] for labels in samples(text, "lori:http_requests_total")} >= {"none", "/generate", "/health"}


def test_requests_under_way_are_a_gauge(tokenizer: PreTrainedTokenizerFast) -> None:
    with (
        served(tokenizer, FakeEngine(num_steps=10**9)) as (client, service),
        client.stream("POST", "/generate", json={"prompt": "x", "stream": True}) as reply,
    ):
        lines = reply.iter_lines()  # a reference: the answer ends when the iterator is collected
        next(lines)
        assert value(service.metrics, "lori:requests_under_way") == 1


def make_account(num_choices: int = 1, names: tuple[str, ...] = ()) -> Account:
    terms = tuple(AdapterTerm(name, name, 1.0) for name in names)
    asked = request(num_prompt=5, num_choices=num_choices)
    return Account(Request(**{key: getattr(asked, key) for key in asked.__slots__} | {"terms": terms}), Metrics("fake"))


def test_gaps_are_between_tokens() -> None:
    """Count neither the echo of a prompt as a token, nor text that was held back and comes at the end."""
    for held_back in (False, True):
        account = make_account()
        account.record(TextEvent("echo", is_prompt=True))
        for _ in range(4):
            account.record(TextEvent("x"))
        if held_back:
            account.record(TextEvent("held back"))
        account.record(DoneEvent("length", 5, 4))
        account.close()
        assert value(account.metrics, "vllm:inter_token_latency_seconds_count") == 3
        assert value(account.metrics, "vllm:time_to_first_token_seconds_count") == 1


def test_gaps_are_between_tokens_of_one_choice() -> None:
    account = make_account(num_choices=2)
    for _ in range(3):
        for choice in (0, 1):
            account.record(TextEvent("x", choice=choice))
    for choice in (0, 1):
        account.record(DoneEvent("length", 5, 3, choice))
    account.close()
    assert value(account.metrics, "vllm:inter_token_latency_seconds_count") == 4
    assert value(account.metrics, "vllm:prompt_tokens_total") == 5
    assert value(account.metrics, "vllm:generation_tokens_total") == 6


def test_timings_are_observed_by_choice() -> None:
    account = make_account()
    account.record(DoneEvent("stop", 5, 1, timings=Timings(queue=1, prefill=2, decode=4)))
    account.close()
    for part, seconds in (("queue", 1), ("prefill", 2), ("decode", 4)):
        assert value(account.metrics, f"vllm:request_{part}_time_seconds_sum") == seconds


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (DoneEvent("stop_sequence", 5, 2), "stop"),
        (DoneEvent("stop", 5, 2), "stop"),
        (DoneEvent("length", 5, 2), "length"),
        (ErrorEvent("out of luck"), "error"),
        (None, "abort"),
    ],
)
def test_ends_are_counted_by_vllm_s_reasons(last: DoneEvent | ErrorEvent | None, reason: str) -> None:
    account = make_account(names=("math",))
    account.metrics.watch_adapters(lambda: ["math"], tuple)
    account.record(TextEvent("x"))
    account.record(TextEvent("x"))
    if last:
        account.record(last)
    account.close()
    assert value(account.metrics, "vllm:request_success_total", finished_reason=reason) == 1
    assert value(account.metrics, "vllm:generation_tokens_total") == 2, "the tokens before an abort count, too"
    assert value(account.metrics, "lori:adapter_tokens_total", adapter="math", kind="prompt") == 5


def test_with_many_adapters_only_resident_ones_are_listed() -> None:
    metrics = Metrics("fake")
    names = [f"adapter-{i}" for i in range(MAX_LISTED)]
    metrics.watch_adapters(lambda: names, lambda: {"adapter-7"})
    listed = [labels["adapter"] for labels in samples(metrics.text().decode(), "lori:adapter_resident")]
    assert listed == names
    assert value(metrics, "lori:adapter_resident", adapter="adapter-7") == 1
    assert value(metrics, "lori:adapter_resident", adapter="adapter-8") == 0
    names.append("one more")
    assert samples(metrics.text().decode(), "lori:adapter_resident") == [{"adapter": "adapter-7"}]


def test_counts_are_current_at_every_scrape() -> None:
    metrics = Metrics("fake")
    metrics.watch_adapters(lambda: ["math", 'qu"o\\te'], tuple)
    for total in (1, 2, 3):
        metrics.count_admitted(["math", 'qu"o\\te'])
        assert value(metrics, "lori:adapter_requests_total", adapter="math") == total
        assert value(metrics, "lori:adapter_requests_total", adapter='qu"o\\te') == total


def test_the_counts_of_an_unregistered_adapter_are_dropped() -> None:
    """Regression: /metrics grew without bound if adapter names came and went."""
    metrics, names = Metrics("fake"), ["math", "gone"]
    metrics.watch_adapters(lambda: names, tuple)
    metrics.count_admitted(names)
    assert b"gone" in metrics.text()
    names.remove("gone")
    metrics.count_tokens(["math", "gone"], 3, 4)
    assert b"gone" not in metrics.text()
    assert metrics.adapters._counts.keys() == {"math"}
    assert value(metrics, "lori:adapter_tokens_total", adapter="math", kind="generated") == 4
    names.append("gone")
    metrics.count_admitted(["gone"])
    assert value(metrics, "lori:adapter_requests_total", adapter="gone") == 1


@pytest.mark.parametrize(
    ("weights", "are_automatic", "models"),
    [
        ((1.0, 0.75), (False, False), ["math", "law", "math:1+law:0.75"]),
        ((0.5, 0.5), (False, False), ["math", "law", "math+law"]),
        ((0.75, 0.25), (True, True), ["math", "law", "math+law"]),
        ((0.0, 0.75), (True, True), ["law", "math+law"]),
        ((0.25, 1.0), (True, False), ["math", "law", "math:auto+law:1"]),
    ],
)
def test_a_merge_is_listed_as_it_is_asked_for(
    weights: tuple[float, float], are_automatic: tuple[bool, bool], models: list[str]
) -> None:
    named = zip(("math", "law"), weights, are_automatic, strict=True)
    terms = tuple(AdapterTerm(name, "1" * 64, weight, is_automatic) for name, weight, is_automatic in named)
    assert [*_request_models(replace(request(), terms=terms))] == models


def test_no_model_s_name_has_block_weights() -> None:
    terms = (AdapterTerm("math", "1" * 64, 1.0, block_weights=(0.5, 2.0)), AdapterTerm("law", "2" * 64, 1.0))
    assert [*_request_models(replace(request(), terms=terms))] == ["math", "law"]


@pytest.mark.slow
def test_scraping_is_safe_while_the_engine_changes() -> None:
    """Check that scraping reads atomic copies: a loop over a collection that another thread changes raises."""
    residents = Residents(64, 2**20)
    sequences = [Sequence(request(name=f"a{i}")) for i in range(64)]
    running: dict[Sequence, None] = {}
    scheduler = SimpleNamespace(
        kv_cache=SimpleNamespace(usage=0.0, num_prefix_query_tokens=0, num_prefix_hit_tokens=0, block_size=16, num_blocks=1),
        running=running,
        waiting=running,
        num_waiting=0,
        num_preemptions=0,
    )
    adapter_cache = SimpleNamespace(residents=residents, num_loaded=0, num_loaded_bytes=0, num_failures=0, observe_load=None)
    metrics = make_metrics("fake", Registry([]), cast(Scheduler, scheduler), cast(AdapterCache, adapter_cache))
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for number, sequence in enumerate(sequences):
                running[sequence] = None
                residents.add(f"a{number}", 1, 1.0)
            for number, sequence in enumerate(sequences):
                del running[sequence]
                residents.remove(f"a{number}")

    engine, interval = threading.Thread(target=change), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    engine.start()
    try:
        for _ in range(300):
            metrics.text()
        for _ in range(20_000):
            assert len(residents.digests) <= 64
    finally:
        stop.set()
        engine.join()
        sys.setswitchinterval(interval)
