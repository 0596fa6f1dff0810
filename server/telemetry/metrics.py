"""The metrics of /metrics, under vLLM's names and labels where the meaning is the same.

Counts by adapter are kept as lines of Prometheus's text, so that ten thousand adapters take milliseconds. Labels only have names
of registered adapters, never text from a client.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.engine.request import Timings

MAX_LISTED = 1000
"""Number of adapters up to which adapters that are not resident are listed, too."""
REQUESTS = b"""\
# HELP lori:adapter_requests_total Admitted requests by adapter; one that names several counts for each.
# TYPE lori:adapter_requests_total counter
"""
TOKENS = b"""\
# HELP lori:adapter_tokens_total Tokens of ended requests by adapter; those of a request that names several count for each.
# TYPE lori:adapter_tokens_total counter
"""
RESIDENT = f"""\
# HELP lori:adapter_resident Whether the adapter is in the kernels' operands; of more than {MAX_LISTED} only those that are.
# TYPE lori:adapter_resident gauge
""".encode()


@dataclass(slots=True)
class _AdapterCount:
    label: str
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    requests: bytes = b""
    tokens: bytes = b""

    def write(self) -> None:
        self.requests = f"lori:adapter_requests_total{{{self.label}}} {self.num_requests}\n".encode()
        self.tokens = (
            f'lori:adapter_tokens_total{{{self.label},kind="prompt"}} {self.num_prompt_tokens}\n'
            f'lori:adapter_tokens_total{{{self.label},kind="generated"}} {self.num_generated_tokens}\n'
        ).encode()


class AdapterCounts:
    """Counts of requests and tokens by adapter. For the event loop alone."""

    def __init__(self) -> None:
        self._counts: dict[str, _AdapterCount] = {}
        self._changed: dict[str, _AdapterCount] = {}

    def admit(self, names: Iterable[str]) -> None:
        """Count a request for these adapters."""
        for name in names:
            self._count(name).num_requests += 1

    def add_tokens(self, names: Iterable[str], num_prompt: int, num_generated: int) -> None:
        """Count the tokens of a request for these adapters."""
        for name in names:
            count = self._count(name)
            count.num_prompt_tokens += num_prompt
            count.num_generated_tokens += num_generated

    def lines(self, registered: Collection[str], resident: Collection[str]) -> list[bytes]:
        """Return all lines in Prometheus's format. Only formats the lines that have changed.

        Names that are no longer registered are forgotten. If they come back, Prometheus sees a counter that starts anew.
        """
        for name in [name for name in self._counts if name not in registered]:
            del self._counts[name]
            self._changed.pop(name, None)
        for count in self._changed.values():
            count.write()
        self._changed.clear()
        counts = self._counts.values()
        names = registered if len(registered) <= MAX_LISTED else resident
        gauges = [f"lori:adapter_resident{{{label(name)}}} {int(name in resident)}\n".encode() for name in names]
        return [
            REQUESTS,
            *(entry.requests for entry in counts),
            TOKENS,
            *(entry.tokens for entry in counts),
            RESIDENT,
            *gauges,
        ]

    def _count(self, name: str) -> _AdapterCount:
        count = self._counts.get(name)
        if count is None:
            count = self._counts[name] = _AdapterCount(label(name))
        self._changed[name] = count
        return count


def label(name: str) -> str:
    """Return the label of an adapter in Prometheus's text format."""
    escaped = name.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'adapter="{escaped}"'


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
SHARES = (0, 0.25, 0.5, 0.75, 1)
NUM_TERMS = (0, 1, 2, 3, 4, 8, 16, 32, 64)
disable_created_metrics()
LABELS = ("model_name", "engine")
ENGINE = "0"
"""vLLM's index of the engine. There is only one here."""
REASONS = {"stop": "stop", "stop_sequence": "stop", "length": "length", "cancelled": "abort", "error": "error"}
"""Finish reasons of requests, and their names in vLLM's metrics."""
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
        self.base_share = self._histogram(
            "lori:auto_base_share", "The base's share of a request's automatic weights, and of selections (auto).", SHARES
        )
        self.auto_seconds = self._histogram(
            "lori:auto_weights_seconds", "Waiting for the automatic weights, or the selection (auto), of a request's prompts."
        )
        merges_text = "Admitted requests by named merge; one that names several counts for each."
        self._merges = Counter("lori:merge_requests", merges_text, ("merge",), registry=self.registry)
        ended = Counter("vllm:request_success", "Ended requests by reason.", (*LABELS, "finished_reason"), registry=self.registry)
        self._ended = {ours: ended.labels(base_model, ENGINE, theirs) for ours, theirs in REASONS.items()}
        self._http = Counter("lori:http_requests", "Answers by route and status.", ("route", "status"), registry=self.registry)

    def count_admitted(self, names: Sequence[str], merges: Iterable[str] = ()) -> None:
        """Count an admitted request for the adapters of these names, which are registered, and for the named merges."""
        self.merge_terms.observe(len(names))
        self.adapters.admit(names)
        for merge in merges:
            self._merges.labels(merge).inc()

    def count_ended(self, reason: str, seconds: float) -> None:
        """Count an admitted request that has ended."""
        self._ended[reason].inc()
        self.latency.observe(seconds)

    def count_tokens(self, names: Sequence[str], num_prompt: int, num_generated: int) -> None:
        """Count the tokens of a request."""
        self.prompt_tokens.inc(num_prompt)
        self.generation_tokens.inc(num_generated)
        self.adapters.add_tokens(names, num_prompt, num_generated)

    def observe_timings(self, timings: Timings) -> None:
        """Observe the timings of a choice."""
        self.queue.observe(timings.queue)
        self.prefill.observe(timings.prefill)
        self.decode.observe(timings.decode)

    def count_answer(self, route: str, status: int) -> None:
        """Count an HTTP answer. `route` is a route's template, not a path."""
        self._http.labels(route, str(status)).inc()

    def watch_count(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Add a counter `name`, to which `_total` is appended, that is read whenever the metrics are."""
        self.registry.register(_Count(name, help_text, self.base_model, read))

    def watch(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read whenever the metrics are."""
        Gauge(name, help_text, LABELS, registry=self.registry).labels(self.base_model, ENGINE).set_function(read)

    def watch_adapters(self, registered: Names, resident: Names) -> None:
        """Add the gauge of which registered adapters are resident, by name."""
        self._registered, self._resident = registered, resident

    def add_cache_info(self, block_size: int, num_blocks: int) -> None:
        """Add the block layout of KV memory, from which gateways know which part of a prompt a server may still have."""
        labels = (*LABELS, "block_size", "num_gpu_blocks")
        info = Gauge(
            "vllm:cache_config_info", "Blocks of KV memory, wherever it is, and their tokens.", labels, registry=self.registry
        )
        info.labels(self.base_model, ENGINE, str(block_size), str(num_blocks)).set(1)

    def watch_requests(self, running: Names, waiting: Names, max_resident: int) -> None:
        """Add the gauge of the names in running and waiting requests, in the form of `model`."""
        self.registry.register(_LoraRequests(running, waiting, max_resident))

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return b"".join([generate_latest(self.registry), *self.adapters.lines(self._registered(), self._resident())])

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, LABELS, registry=self.registry).labels(self.base_model, ENGINE)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        return Histogram(name, help_text, LABELS, buckets=buckets, registry=self.registry).labels(self.base_model, ENGINE)


@dataclass(frozen=True, slots=True)
class _Count(Collector):
    """A counter that is read from elsewhere."""

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
    """vLLM's gauge of the active adapters, which are in its labels, and its time. Gateways send requests to servers that have the
    adapter.

    There is one sample, the present one; vLLM keeps every combination that ever was. At most as many waiting adapters are listed
    as could be resident.
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
