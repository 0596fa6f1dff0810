"""The metrics of several replicas as those of one server, each sample labelled with its replica."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


def merged_metrics(texts: Mapping[str, str]) -> bytes:
    """Returns the samples of `texts`, which are in Prometheus's format, by the name of the replica that each is of."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Texts(texts))
    return generate_latest(registry)


class _Texts(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for found in text_string_to_metric_families(text):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.add_sample(sample.name, {**sample.labels, LABEL: replica}, sample.value)
        yield from families.values()
