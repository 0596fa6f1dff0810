"""Gauges and counters of /metrics that read the engine while its thread runs: numbers, and copies that are made atomically."""

from collections.abc import Collection, Iterable

from server.engine.adapters.cache import AdapterCache
from server.engine.adapters.registry import Registry
from server.engine.request import Request, RequestedWeight, Sequence
from server.engine.scheduling.scheduler import Scheduler
from server.schemas.model_names import model_of
from server.telemetry.metrics import Metrics


def make_metrics(model: str, registry: Registry, scheduler: Scheduler, adapter_cache: AdapterCache) -> Metrics:
    """Return the metrics of a server of `model`."""
    metrics, cache, residents = Metrics(model), scheduler.kv_cache, adapter_cache.residents
    for name, help_text, read in (
        ("vllm:num_requests_running", "Requests in the batch.", lambda: len(scheduler.running)),
        ("vllm:num_requests_waiting", "Requests that wait for a place.", lambda: scheduler.num_waiting),
        ("vllm:kv_cache_usage_perc", "Share of the KV memory in use.", lambda: cache.usage),
        ("lori:adapters_registered", "Adapters that can be asked for.", lambda: len(registry.by_name)),
        ("lori:adapters_faulty", "Adapters, versions and aliases that are damaged and not served.", lambda: len(registry.faulty)),
        ("lori:adapters_loaded", "Adapters in RAM, ready to be made resident.", lambda: adapter_cache.num_loaded),
        ("lori:adapters_loaded_bytes", "What they take.", lambda: adapter_cache.num_loaded_bytes),
        ("lori:adapters_resident", "Adapters in the kernels' operands.", lambda: len(residents)),
        ("lori:adapters_resident_bytes", "What they take.", lambda: residents.num_bytes),
        ("lori:adapters_in_use", "Resident adapters that a running request uses.", lambda: residents.num_in_use),
        ("lori:adapters_pinned", "Resident adapters that an admin has pinned.", lambda: residents.num_pinned),
    ):
        metrics.watch(name, help_text, read)
    for name, help_text, read in (
        ("vllm:num_preemptions", "Requests that gave up their KV memory.", lambda: scheduler.num_preemptions),
        ("vllm:prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", lambda: cache.num_prefix_query_tokens),
        ("vllm:prefix_cache_hits", "Prompt tokens found there.", lambda: cache.num_prefix_hit_tokens),
        ("lori:adapter_load_failures", "Adapters that could not be read or made resident.", lambda: adapter_cache.num_failures),
        ("lori:adapter_evictions", "Adapters that made room for others.", lambda: residents.num_evictions),
    ):
        metrics.watch_count(name, help_text, read)
    metrics.add_cache_info(cache.block_size, cache.num_blocks)
    metrics.watch_requests(lambda: _model_names(scheduler.running), lambda: _model_names(scheduler.waiting), residents.num_slots)
    metrics.watch_adapters(lambda: registry.by_name.keys(), lambda: _resident(registry, residents.digests))
    adapter_cache.observe_load = metrics.load_seconds.observe
    return metrics


def _model_names(sequences: Iterable[Sequence]) -> Collection[str]:
    # Unique names in the order of the sequences. The interpreter copies a dict's keys atomically; a loop over them could meet a
    # change.
    return dict.fromkeys(name for sequence in [*sequences] for name in _request_models(sequence.request))


def _request_models(request: Request) -> Iterable[str]:
    yield from (term.name for term in (*request.terms, *request.policy) if term.has_weight)
    if request.terms and not any(term.block_weights for term in request.terms):  # a model's name cannot have them
        weights: list[RequestedWeight] = ["auto" if term.is_automatic else term.weight for term in request.terms]
        yield model_of([term.name for term in request.terms], weights)


def _resident(registry: Registry, digests: frozenset[str]) -> set[str]:
    return {name for name, adapter in registry.by_name.items() if adapter.summary.digest in digests}
