"""What /metrics says, under vLLM's names where the meaning is the same."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
disable_created_metrics()
MODEL = ("model_name",)


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, base_model: str) -> None:
        self.registry, self.base_model = CollectorRegistry(), base_model
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of ended requests.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens of ended requests.")
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "From admission to the first text.")
        self.latency = self._histogram("vllm:e2e_request_latency_seconds", "From admission to the end.")
        self.success = Counter(
            "vllm:request_success", "Ended requests by reason.", (*MODEL, "finished_reason"), registry=self.registry
        )
        self.load_seconds = self._histogram("lori:adapter_load_seconds", "Reading, checking and packing an adapter.")
        self.adapter_requests = Counter(
            "lori:adapter_requests", "Admitted requests by adapter.", ("adapter",), registry=self.registry
        )

    def watch_count(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Adds a counter, `name` with `_total` after it, that is read whenever the metrics are."""
        self.registry.register(_Count(name, help_text, self.base_model, read))

    def watch(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Adds a gauge that is read whenever the metrics are."""
        Gauge(name, help_text, MODEL, registry=self.registry).labels(self.base_model).set_function(read)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, MODEL, registry=self.registry).labels(self.base_model)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, MODEL, buckets=SECONDS, registry=self.registry).labels(self.base_model)


@dataclass(frozen=True, slots=True)
class _Count(Collector):
    """A counter that somebody else counts."""

    name: str
    help_text: str
    base_model: str
    read: Callable[[], float]

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily(self.name, self.help_text, labels=MODEL)
        family.add_metric([self.base_model], self.read())
        return [family]
