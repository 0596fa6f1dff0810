"""Builds a service from settings: base model, adapters, engine."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.entry import Entry
from lori.errors import ModelError
from lori.kernels.native import MISSING, MODULE, description
from lori.pool import AdapterPool
from lori.store import AdapterStore
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.kv_cache import BlockAllocator
from server.engine.probe import check, use_paged_attention
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.thread import EngineThread
from server.metrics import Metrics
from server.service import Service
from server.settings import Settings
from server.stores import load_all

logger = logging.getLogger(__name__)
MIN_CONTEXT = 16
"""Tokens of KV memory below which nothing can be served."""
DEMO_ADAPTERS = Path(__file__).parent / "adapters"


def load_service(settings: Settings) -> Service:
    """Loads everything. Raises `LoriError` with what is wrong: no model, an unsound adapter, a model that cannot be served."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    base = load_base_model(settings.model, resolve_dtype(settings.dtype))
    adapters = load_all(_entries(settings), base.identity)
    expected = use_paged_attention(base.model)
    pool = AdapterPool(base.model, adapters)
    num_blocks = _num_blocks(settings, base)
    try:
        runner = Runner(base.model, pool, num_blocks, settings.block_size)
    except RuntimeError as error:
        raise ModelError(f"--kv-cache-gib {settings.kv_cache_gib:g}: {' '.join(str(error).split())}") from error
    check(runner, base.model, expected, settings.block_size)
    scheduler = Scheduler(BlockAllocator(num_blocks, settings.block_size), settings.max_batch, settings.max_step_tokens)
    max_context = min(base.model.config.get_text_config().max_position_embeddings, num_blocks * settings.block_size)
    logger.info(
        "%s in %s on %s, %d threads; deltas in %s; %d adapters resident in %.1f MiB; keys and values of %d tokens in %.0f MiB",
        base.name,
        str(base.model.dtype).removeprefix("torch."),
        base.model.device,
        torch.get_num_threads(),
        description(),
        len(adapters),
        pool.num_bytes / 2**20,
        num_blocks * settings.block_size,
        runner.memory.num_bytes / 2**20,
    )
    if not MODULE:
        logger.warning(
            "SLOW: %s. Until then deltas take several times as long, the more adapters share a batch, and adapters more memory.",
            MISSING,
        )
    by_name = {adapter.name: adapter for adapter in adapters}
    engine = EngineThread(Engine(scheduler, runner, base.tokenizer, _stop_ids(base)))
    metrics = Metrics(base.name)
    metrics.watch("vllm:num_requests_running", "Requests in the batch.", lambda: len(scheduler.running))
    metrics.watch("vllm:num_requests_waiting", "Requests that wait for a place.", lambda: len(scheduler.waiting))
    metrics.watch("vllm:kv_cache_usage_perc", "Share of the KV memory in use.", lambda: scheduler.allocator.usage)
    return Service(
        settings=settings,
        base_model=base.name,
        adapters=by_name,
        admission=Admission(base.tokenizer, by_name, max_context),
        engine=engine,
        metrics=metrics,
    )


def _entries(settings: Settings) -> dict[str, Entry]:
    demo = AdapterStore(DEMO_ADAPTERS).current() if settings.demo_adapters and settings.model is None else {}
    own = AdapterStore(settings.adapters).current() if settings.adapters else {}
    for name in demo.keys() & own.keys():
        logger.info("%s is served in place of the demo adapter %r", own[name].folder, name)
    return dict(sorted((demo | own).items()))


def _num_blocks(settings: Settings, base: BaseModel) -> int:
    num_bytes = Runner.bytes_per_token(base.model) * settings.block_size
    num_blocks = int(settings.kv_cache_gib * 2**30) // num_bytes
    if num_blocks * settings.block_size < MIN_CONTEXT:
        raise ModelError(
            f"--kv-cache-gib {settings.kv_cache_gib:g} holds {num_blocks * settings.block_size} tokens of {base.name}, "
            f"expected at least {MIN_CONTEXT}"
        )
    return num_blocks


def _stop_ids(base: BaseModel) -> Iterable[int]:
    configured = base.model.generation_config.eos_token_id if base.model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in (*ids, base.tokenizer.eos_token_id) if i is not None}
