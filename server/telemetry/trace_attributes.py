"""Attributes of a request's span: OpenTelemetry's names for generative models, and vLLM's for latencies. Imports neither."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from server.telemetry.exchange import Exchange

Value = str | bool | int | float | Sequence[str] | Sequence[float]


class Span(Protocol):
    """The part of OpenTelemetry's span that is used."""

    def is_recording(self) -> bool:
        """Return whether the span is recorded and has not ended."""

    def get_span_context(self) -> Any:
        """Return the span's place in the trace. Its `trace_id` is a number."""

    def record_exception(self, exception: BaseException) -> None:
        """Add an exception."""

    def set_attributes(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes."""


def attributes(exchange: Exchange, base_model: str) -> dict[str, Value]:
    """Return the attributes that are known of an exchange so far."""
    values: dict[str, Value] = {"lori.request_id": exchange.id}
    if not exchange.accounts:
        return values
    accounts, first = exchange.accounts, exchange.accounts[0]
    request, timings = first.request, first.timings
    values |= {
        "gen_ai.provider.name": "lori",
        "gen_ai.request.model": base_model,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.choice.count": request.sampling.num_choices,
        "gen_ai.response.id": request.id,
        "gen_ai.response.finish_reasons": [account.reason for account in accounts],
        "gen_ai.usage.input_tokens": sum(account.num_prompt_tokens for account in accounts),
        "gen_ai.usage.output_tokens": sum(account.num_completion_tokens for account in accounts),
        "lori.adapters": [term.reference for term in request.terms],
        "lori.weights": [term.weight for term in request.terms],
        "lori.policy": [term.reference for term in request.policy],
        "lori.merge": request.merge.method,
    }
    if request.merge_names:
        values["lori.named_merges"] = list(request.merge_names)
    if any(term.block_weights for term in request.terms):
        values["lori.block_weights"] = [" ".join(map(str, term.block_weights)) for term in request.terms]
    if first.total_s:
        values["gen_ai.latency.e2e"] = first.total_s
    if first.first_token_s is not None:
        values["gen_ai.latency.time_to_first_token"] = first.first_token_s
    if timings:
        values["gen_ai.latency.time_in_queue"] = timings.queue
        values["gen_ai.latency.time_in_model_prefill"] = timings.prefill
        values["gen_ai.latency.time_in_model_decode"] = timings.decode
    return values
