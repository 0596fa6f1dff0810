"""What /metrics says, under vLLM's names and labels where the meaning is the same."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.catalog.counts import AdapterCounts
from server.engine.request import Timings

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
NUM_TERMS = (0, 1, 2, 3, 4, 8, 16, 32, 64)
disable_created_metrics()
LABELS = ("model_name", "engine")
ENGINE = "0"
"""vLLM counts a server's engines; here is one."""
REASONS = {"stop": "stop", "stop_sequence": "stop", "length": "length", "cancelled": "abort", "error": "error"}
"""Our reasons for the end of a request, and what vLLM's metrics call them."""
Names = Callable[[], Collection[str]]


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, base_model: str) -> None:
        self.registry, self.base_model = CollectorRegistry(), base_model
        self.adapters = AdapterCounts()
        self._registered: Names = tuple
        self._resident: Names = tuple
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of ended requests.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens of ended requests.")
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "From admission to the first text.")
        self.token_gap = self._histogram("vllm:inter_token_latency_seconds", "From one token to the next.", GAP_SECONDS)
        self.latency = self._histogram("vllm:e2e_request_latency_seconds", "From admission to the end.")
        self.queue = self._histogram("vllm:request_queue_time_seconds", "From submission to the first step.")
        self.prefill = self._histogram("vllm:request_prefill_time_seconds", "From the first step to the first token.")
        self.decode = self._histogram("vllm:request_decode_time_seconds", "From the first token to the end.")
        self.load_seconds = self._histogram("lori:adapter_load_seconds", "Reading, checking and packing an adapter.")
        self.merge_terms = self._histogram("lori:merge_terms", "Adapters that a request names.", NUM_TERMS)
        ended = Counter("vllm:request_success", "Ended requests by reason.", (*LABELS, "finished_reason"), registry=self.registry)
        self._ended = {ours: ended.labels(base_model, ENGINE, theirs) for ours, theirs in REASONS.items()}
        self._http = Counter("lori:http_requests", "Answers by route and status.", ("route", "status"), registry=self.registry)

    def count_admitted(self, names: Sequence[str]) -> None:
        """Counts an admitted request for the adapters of these names, which are registered."""
        self.merge_terms.observe(len(names))
        self.adapters.admit(names)

    def count_ended(self, reason: str, seconds: float) -> None:
        """Counts a request that was admitted and is over."""
        self._ended[reason].inc()
        self.latency.observe(seconds)

    def count_tokens(self, names: Sequence[str], num_prompt: int, num_generated: int) -> None:
        """Counts what a request took and gave."""
        self.prompt_tokens.inc(num_prompt)
        self.generation_tokens.inc(num_generated)
        self.adapters.add_tokens(names, num_prompt, num_generated)

    def observe_timings(self, timings: Timings) -> None:
        """Notes where a choice's time went."""
        self.queue.observe(timings.queue)
        self.prefill.observe(timings.prefill)
        self.decode.observe(timings.decode)

    def count_answer(self, route: str, status: int) -> None:
        """Counts an HTTP answer; `route` is a route's template, not a path."""
        self._http.labels(route, str(status)).inc()

    def watch_count(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Adds a counter, `name` with `_total` after it, that is read whenever the metrics are."""
        self.registry.register(_Count(name, help_text, self.base_model, read))

    def watch(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Adds a gauge that is read whenever the metrics are."""
        Gauge(name, help_text, LABELS, registry=self.registry).labels(self.base_model, ENGINE).set_function(read)

    def watch_adapters(self, registered: Names, resident: Names) -> None:
        """Adds which of the registered adapters are resident, by name."""
        self._registered, self._resident = registered, resident

    def tell_cache(self, block_size: int, num_blocks: int) -> None:
        """Adds how the KV memory is cut, by which gateways know what a server may still have of a prompt."""
        labels = (*LABELS, "block_size", "num_gpu_blocks")
        info = Gauge(
            "vllm:cache_config_info", "Blocks of KV memory, wherever it is, and their tokens.", labels, registry=self.registry
        )
        info.labels(self.base_model, ENGINE, str(block_size), str(num_blocks)).set(1)

    def watch_requests(self, running: Names, waiting: Names, max_resident: int) -> None:
        """Adds what the requests name that run, and those that wait, as `model` would."""
        self.registry.register(_LoraRequests(running, waiting, max_resident))

    def text(self) -> bytes:
        """Returns all of it in Prometheus's text format."""
        return b"".join([generate_latest(self.registry), *self.adapters.lines(self._registered(), self._resident())])

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, LABELS, registry=self.registry).labels(self.base_model, ENGINE)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        return Histogram(name, help_text, LABELS, buckets=buckets, registry=self.registry).labels(self.base_model, ENGINE)


@dataclass(frozen=True, slots=True)
class _Count(Collector):
    """A counter that somebody else counts."""

    name: str
    help_text: str
    base_model: str
    read: Callable[[], float]

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily(self.name, self.help_text, labels=LABELS)
        family.add_metric([self.base_model, ENGINE], self.read())
        return [family]


@dataclass(frozen=True, slots=True)
class _LoraRequests(Collector):
    """vLLM's gauge of which adapters are at work, in its labels, and when that was: gateways send requests where theirs is.

    There is one sample, the present one; vLLM leaves every combination that ever was. Of those that wait it has no more than
    could be resident.
    """

    running: Names
    waiting: Names
    max_resident: int

    def collect(self) -> Iterable[GaugeMetricFamily]:
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of running and of waiting requests.", labels=names)
        running, waiting = (",".join(sorted([*read()][: self.max_resident])) for read in (self.running, self.waiting))
        family.add_metric([str(self.max_resident), running, waiting], time.time())
        return [family]
