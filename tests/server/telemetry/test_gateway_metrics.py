"""What the Gateway API's endpoint picker reads of /metrics, by its protocol of model servers and docker/inferencepool.yaml."""

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
"""Of 16 tokens: what the session's server has."""


def scraped(live: Live) -> dict[str, Metric]:
    """Returns the families that the picker asks for, from where it asks for them."""
    text = live.client.get(PARAMETERS["metrics-data-source"]["path"]).text
    wanted = {spec for field, spec in ENGINE.items() if field.endswith("Spec")}
    found = {family.name: family for family in text_string_to_metric_families(text) if family.name in wanted}
    assert found.keys() == wanted, "one that is missing has the picker take the server for broken"
    return found


def numbers(live: Live) -> list[float]:
    """Returns how many requests wait and run, and the share of KV memory that they have."""
    families = scraped(live)
    specs = (ENGINE[f"{name}Spec"] for name in ("queuedRequests", "runningRequests", "kvUsage"))
    return [sample.value for spec in specs for sample in families[spec].samples]


def adapters(live: Live, which: str) -> list[str]:
    """Returns the adapters of the label, split as the picker does."""
    [sample] = scraped(live)[LORA].samples
    return [name.strip() for name in sample.labels[f"{which}_lora_adapters"].split(",") if name.strip()]


@contextmanager
def writing(live: Live, letter: str, model: str) -> Iterator[None]:
    """Has the server write for long, with half of its memory."""
    body = {"prompt": letter * 2500, "model": model, "stream": True, "max_tokens": 1500, "temperature": 0}
    with live.client.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()  # which ends the answer when it is gone
        next(lines)
        yield


def test_each_is_a_gauge_of_one_sample_for_the_one_engine(live: Live) -> None:
    for name, family in scraped(live).items():
        assert family.type == "gauge", name
        assert len(family.samples) == 1, name
    [cache] = scraped(live)[CACHE].samples
    assert (cache.labels["block_size"], cache.labels["num_gpu_blocks"], cache.value) == ("16", str(NUM_BLOCKS), 1)


def test_they_follow_what_runs_and_waits(live: Live) -> None:
    """`model` as it is asked for is found again where it is at work, a merge with its weights, too."""
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
def test_no_more_are_told_than_could_be_resident(num: int) -> None:
    metrics = Metrics("fake")
    names = [f"adapter-{number:04}" for number in range(num)]
    metrics.watch_requests(lambda: names[:2], lambda: names, 1024)
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    [sample] = families[LORA].samples
    assert sample.labels["waiting_lora_adapters"].split(",") == names[:1024]
    assert sample.labels["max_lora"] == "1024"
