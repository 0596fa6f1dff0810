"""The metrics of several replicas in one text."""

from prometheus_client.parser import text_string_to_metric_families

from server.cluster.merged_replies import merged_metrics
from server.telemetry.metrics import Metrics


def test_each_sample_has_its_replica() -> None:
    texts = {}
    for replica, number, seconds in (("a", 3, 0.5), ("b", 5, 1.0)):
        metrics = Metrics("base")
        for _ in range(number):
            metrics.count_admitted(["math"])
        metrics.count_ended("stop", seconds)
        texts[replica] = metrics.text().decode()
    families = {family.name: family for family in text_string_to_metric_families(merged_metrics(texts).decode())}
    ended = [s for s in families["vllm:request_success"].samples if s.labels["finished_reason"] == "stop" and s.value]
    assert [(s.labels["replica"], s.value) for s in ended] == [("a", 1.0), ("b", 1.0)]
    latency = families["vllm:e2e_request_latency_seconds"]
    assert latency.type == "histogram"
    assert {s.labels["replica"]: s.value for s in latency.samples if s.name.endswith("_sum")} == {"a": 0.5, "b": 1.0}
    assert set(families) == {family.name for family in text_string_to_metric_families(texts["a"])}
    assert all("replica" in s.labels for family in families.values() for s in family.samples)
