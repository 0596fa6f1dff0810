"""What /metrics says, under vLLM's names where the meaning is the same."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, base_model: str) -> None:
        self.registry = CollectorRegistry()
        labels = {"labelnames": ["model_name"], "registry": self.registry}
        self.requests = Gauge("vllm:num_requests", "Requests waiting or running.", **labels).labels(base_model)
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens of ended requests.", **labels).labels(base_model)
        self.generation_tokens = Counter(
            "vllm:generation_tokens", "Generated tokens of ended requests.", **labels
        ).labels(base_model)
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From admission to the first text.", buckets=SECONDS, **labels
        ).labels(base_model)
        self.latency = Histogram(
            "vllm:e2e_request_latency_seconds", "From admission to the end.", buckets=SECONDS, **labels
        ).labels(base_model)
        self.success = Counter(
            "vllm:request_success", "Ended requests by reason.", ["model_name", "finished_reason"], registry=self.registry
        )
        self.adapter_requests = Counter(
            "lori:adapter_requests", "Admitted requests by adapter.", ["adapter"], registry=self.registry
        )
        self.base_model = base_model
