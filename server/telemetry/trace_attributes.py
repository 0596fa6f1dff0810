"""What a span tells of a request, in OpenTelemetry's names for generative models and vLLM's for latencies. Imports neither."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from server.transport.exchange import Exchange

Value = str | bool | int | float | Sequence[str] | Sequence[float]


class Span(Protocol):
    """What is needed of OpenTelemetry's span."""

    def is_recording(self) -> bool:
        """Whether it is not over, and is wanted."""

    def get_span_context(self) -> Any:
        """Its place in the trace: `trace_id` is a number."""

    def record_exception(self, exception: BaseException) -> None:
        """Add what went wrong."""

    def set_attributes(self, attributes: Mapping[str, Value]) -> None:
        """Add to what it tells."""


def attributes(exchange: Exchange, base_model: str) -> dict[str, Value]:
    """Return what is known of an exchange by now."""
    told: dict[str, Value] = {"lori.request_id": exchange.id}
    if not exchange.accounts:
        return told
    accounts, first = exchange.accounts, exchange.accounts[0]
    request, timings = first.request, first.timings
    told |= {
        "gen_ai.provider.name": "lori",
        "gen_ai.request.model": base_model,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.choice.count": request.num_choices,
        "gen_ai.response.id": request.id,
        "gen_ai.response.finish_reasons": [of.reason for of in accounts],
        "gen_ai.usage.input_tokens": sum(of.num_prompt_tokens for of in accounts),
        "gen_ai.usage.output_tokens": sum(of.num_completion_tokens for of in accounts),
        "lori.adapters": [term.reference for term in request.terms],
        "lori.weights": [term.weight for term in request.terms],
        "lori.policy": [term.reference for term in request.policy],
        "lori.merge": request.merge.method,
    }
    if first.total_s:
        told["gen_ai.latency.e2e"] = first.total_s
    if first.first_token_s is not None:
        told["gen_ai.latency.time_to_first_token"] = first.first_token_s
    if timings:
        told["gen_ai.latency.time_in_queue"] = timings.queue
        told["gen_ai.latency.time_in_model_prefill"] = timings.prefill
        told["gen_ai.latency.time_in_model_decode"] = timings.decode
    return told
