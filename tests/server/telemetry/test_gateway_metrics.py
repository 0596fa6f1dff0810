"""The metrics that the Gateway API's endpoint picker reads, by its model server protocol and docker/inferencepool.yaml."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from server.telemetry.metrics import Metrics
from tests.docker.inferencepool import ENGINE, PARAMETERS
from tests.server.live import Live

LORA, CACHE = ENGINE["loraSpec"], ENGINE["cacheInfoSpec"]
NUM_BLOCKS = 512
"""Blocks of 16 tokens in the KV cache of the session's server."""


def scraped(live: Live) -> dict[str, Metric]:
    """Return the metric families that the picker reads, from the path that it reads."""
    text = live.client.get(PARAMETERS["metrics-data-source"]["path"]).text
    wanted = {spec for field, spec in ENGINE.items() if field.endswith("Spec")}
    families = {family.name: family for family in text_string_to_metric_families(text) if family.name in wanted}
    assert families.keys() == wanted, "if a family is missing, the picker considers the server broken"
    return families


def numbers(live: Live) -> list[float]:
    """Return the numbers of waiting and running requests, and the share of KV memory in use."""
    families = scraped(live)
    specs = (ENGINE[f"{name}Spec"] for name in ("queuedRequests", "runningRequests", "kvUsage"))
    return [sample.value for spec in specs for sample in families[spec].samples]


def adapters(live: Live, which: str) -> list[str]:
    """Return the adapters in the label of `which`, "running" or "waiting", split as the picker does."""
    [sample] = scraped(live)[LORA].samples
    return [name.strip() for name in sample.labels[f"{which}_lora_adapters"].split(",") if name.strip()]


@contextmanager
def writing(live: Live, letter: str, model: str) -> Iterator[None]:
    """Keep the server generating until the block ends, with half of its memory."""
    body = {"prompt": letter * 2500, "model": model, "stream": True, "max_tokens": 1500, "temperature": 0}
    with live.client.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()  # a reference: the answer ends when the iterator is collected
        next(lines)
        yield


def test_each_of_the_picker_s_metrics_is_a_gauge_with_one_sample(live: Live) -> None:
    for name, family in scraped(live).items():
        assert family.type == "gauge", name
        assert len(family.samples) == 1, name
    [cache] = scraped(live)[CACHE].samples
    assert (cache.labels["block_size"], cache.labels["num_gpu_blocks"], cache.value) == ("16", str(NUM_BLOCKS), 1)


def test_the_picker_s_metrics_follow_the_running_and_waiting_requests(live: Live) -> None:
    """Check that the labels list `model` as requests spell it, including the weights of a merge."""
    live.wait_for(running=0, waiting=0)
    assert numbers(live) == [0, 0, 0]
    assert adapters(live, "running") == adapters(live, "waiting") == []
    with ExitStack() as stack:
        stack.enter_context(writing(live, "a", "math:1+safety:0.8"))
        stack.enter_context(writing(live, "b", "safety"))
        body = {"prompt": "c" * 3600, "model": "safety+intent", "max_tokens": 1}
        waiting = threading.Thread(target=lambda: live.client.post("/v1/completions", json=body))
        waiting.start()
        live.wait_for(running=2, waiting=1)
        num_waiting, num_running, usage = numbers(live)
        assert (num_waiting, num_running) == (1, 2)
        assert 0.5 < usage <= 1
        assert adapters(live, "running") == ["math", "math:1+safety:0.8", "safety"]
        assert adapters(live, "waiting") == ["intent", "safety", "safety+intent"]
    waiting.join()
    live.wait_for(running=0, waiting=0)


@pytest.mark.parametrize("num", [3, 5000])
def test_no_more_adapters_are_listed_than_can_be_resident(num: int) -> None:
    metrics = Metrics("fake")
    names = [f"adapter-{number:04}" for number in range(num)]
    metrics.watch_requests(lambda: names[:2], lambda: names, 1024)
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    [sample] = families[LORA].samples
    assert sample.labels["waiting_lora_adapters"].split(",") == names[:1024]
    assert sample.labels["max_lora"] == "1024"
