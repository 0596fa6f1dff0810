"""Builds a service from settings: base model, adapters, engine."""

import atexit
import gc
import logging
import os
from collections.abc import Iterable, Mapping
from functools import partial
from math import inf

import torch

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.basis import Basis, Seeded
from lori.config import ExplicitConfig
from lori.device import device_name, resolve_device
from lori.errors import AdapterError, ModelError
from lori.kernels.native import MISSING, MODULE, choose, description, max_isa
from lori.names import EMBEDDED_NAME, base_aliases
from lori.packed_adapter import PackedReader
from lori.pool import AdapterPool
from lori.projection import Quantization, has_native
from lori.resources import BackgroundLoad, use_threads, warn_if_busy
from lori.store.entry import Entry
from lori.store.remote_folder import redacted
from lori.summary import Summary
from server.access.key_ring import KeyRing
from server.access.policy import check_policies
from server.catalog.files import AdapterFiles
from server.catalog.fit import Fit
from server.catalog.inventory import take_inventory
from server.engine.adapters.cache import AdapterTiers
from server.engine.adapters.loader import Loader
from server.engine.adapters.registry import FaultyAdapterError, Registered, Registry, meanings
from server.engine.adapters.residents import Residents
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.grammar import GrammarError
from server.engine.model.families import check_family
from server.engine.model.runner import Runner, bytes_per_token
from server.engine.sampling.grammars import Grammars
from server.engine.sampling.sampler import Sampler
from server.engine.scheduling.kv_cache import KvCache
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.step_budget import StepLimits
from server.engine.startup import check, measure_step_cost, own_logits
from server.engine.step import Turn
from server.engine.thread import EngineThread
from server.service import Service
from server.settings import Settings
from server.stores import open_stores
from server.telemetry.gauges import make_metrics

logger = logging.getLogger(__name__)
MIN_CONTEXT = 16
"""Tokens of KV memory below which nothing can be served."""
GIB = 2**30
BYTES_PER_ENTRY = {torch.bfloat16: 4.5, torch.float32: 6.5}
"""Of a resident adapter: a little more than what was measured at a tenth kept."""
PATIENCE_S = 0.005
"""What a step waits for an adapter that is being read: about as long as that takes."""
NUM_SPARE_BLOCKS = {"cpu": 0, "cuda": 1}
"""Of KV memory, which no sequence owns (`GpuOps`)."""
NEW_RANK, NEW_DENSITY = 32, 0.1
"""What adapters are likely to be that come while the server runs, where there is none yet."""
NUM_FETCHED = 8
"""Adapters that come from a store that lies elsewhere at once: they wait for the network, not for a core."""
BYTES_PER_PART = 8
"""Of each entry of an adapter that is read to be merged: a position and a value."""
NUM_MERGES = 32
"""Merges that are no sums for which there is room from the start."""


def load_service(settings: Settings, num_ingresses: int = 0) -> Service:
    """Load everything. Raises `LoriError` with what is wrong: no model, an unsound adapter, a model that cannot be served.

    `num_ingresses` are in front of this process, see `Service`. Raises `KeyFileError` where the key file is not sound.
    """
    max_isa()  # an unknown one is refused before anything is loaded, on a GPU too
    keys = KeyRing(settings.keys) if settings.keys else None
    own, demo = open_stores(settings)  # what cannot be reached is said before a model is loaded
    use_threads(settings.threads)
    load = BackgroundLoad()
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    logger.info("loading %s in %s on %s …", settings.model or EMBEDDED_NAME, _name(dtype), device_name(device))
    # Its own attention only says what the logits should be; not every family has another than the eager one.
    base = load_base_model(settings.model, dtype, "eager", device)
    check_family(base.model)
    if own:
        logger.info("reading the adapters in %s …", redacted(str(settings.adapters)))
    inventory = take_inventory(own, demo, base.identity, is_strict=settings.strict)
    registry = make_registry(inventory.entries, inventory.summaries)
    registry.note_faulty(inventory.faulty)
    logger.info("preparing the model for %d adapters, and checking it against transformers …", len(registry.by_name))
    expected = own_logits(base.model)
    pool = make_pool(base, registry, settings.max_resident, own is not None, settings.max_rank)
    num_blocks = _num_blocks(settings, base)
    runner = Runner(base.model, pool, num_blocks, settings.block_size, settings.max_batch, settings.quantization)
    _reserve(pool, min(int(settings.resident_gib * GIB), _likely_bytes(base, registry, pool, settings.max_resident)))
    max_context = min(base.model.config.get_text_config().max_position_embeddings, num_blocks * settings.block_size)
    check(runner, base.model, expected, max_context, settings.block_size)
    if not settings.threads and device.type == "cpu":
        warn_if_busy(load)
    logger.info("timing steps …")
    limits = _limits(settings, base, runner, max_context, num_blocks)
    if device.type == "cuda":  # only now: a step with prompts costs what was measured, which is more than a replayed one does
        runner.prepare()
        check(runner, base.model, expected, max_context, settings.block_size)
    residents = Residents(settings.max_resident, int(settings.resident_gib * GIB))
    reader = PackedReader(base.identity, pool.layouts)
    files = AdapterFiles(own, demo, reader, Fit.of(pool), settings.max_upload_bytes)
    others, damaged = files.others(registry.by_name.values(), inventory.faulty)
    registry.add(others)
    registry.note_faulty(damaged)
    if keys:
        keys.require(
            lambda found: check_policies(found, partial(_meaning, registry), registry.by_name, partial(_absence, registry))
        )
        logger.info("%s", keys.keys)
    loader = Loader(registry, reader, NUM_FETCHED)
    tiers = AdapterTiers(pool, residents, loader, int(settings.loaded_gib * GIB), patience_s=_patience_s(device))
    cache = KvCache(num_blocks, settings.block_size, base.identity.digest)
    scheduler = Scheduler(cache, tiers, limits, settings.max_priority_wait_s or inf)
    grammars = make_grammars(base)
    _log(base, settings.quantization, len(registry.by_name), runner, num_blocks * settings.block_size, limits)
    # What is here now stays: the collector, which stops the world, need not look at it again and again.
    gc.collect()
    gc.freeze()
    # At the end of the process it does look: cycles that are left hold objects of libtriton's, which torch imports where it is
    # installed, and nanobind would list them as leaks.
    atexit.register(gc.unfreeze)
    num_ids = base.model.config.get_text_config().vocab_size
    engine = Engine(scheduler, runner, tiers, base.tokenizer.backend_tokenizer, _stop_ids(base), grammars=grammars)
    return Service(
        settings=settings,
        base_model=base.name,
        base_aliases=base_aliases(settings.model),
        registry=registry,
        admission=Admission(
            base.tokenizer,
            registry,
            max_context,
            settings.max_resident,
            _max_kept(base, settings),
            num_ids,
            grammars,
            max_merged=settings.resident_gib * GIB / BYTES_PER_PART,
        ),
        engine=EngineThread(engine, settings.max_step_s),
        metrics=make_metrics(base.name, registry, scheduler, tiers),
        keys=keys,
        num_ingresses=num_ingresses,
        required=lambda: [name for of in keys.keys.tenants.values() for name, _ in of.policy] if keys else [],
        files=files,
        outline=f"{_outline(base)}, {_capacity(base, registry, pool, settings)}",
    )


def _limits(settings: Settings, base: BaseModel, runner: Runner, max_context: int, num_blocks: int) -> StepLimits:
    try:
        cost = measure_step_cost(
            Turn(runner, Sampler(_stop_ids(base))),
            num_ids=base.model.config.get_text_config().vocab_size,
            max_tokens=settings.max_step_tokens,
            max_sequences=settings.max_batch,
            max_context=max_context,
            num_blocks=num_blocks,
            block_size=settings.block_size,
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(
            f"--max-step-tokens, --kv-cache-gib: there is no room for a step: {' '.join(str(error).split())}"
        ) from error
    return StepLimits(
        max_sequences=settings.max_batch,
        max_tokens=settings.max_step_tokens,
        max_stall=settings.max_stall,
        short_step_s=settings.short_step_ms / 1000,
        cost=cost,
    )


def _patience_s(device: torch.device) -> float:
    # Where a step takes every core it would take the loader's, too, and what is read half way would wait for the step after it.
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return PATIENCE_S if device.type == "cpu" and torch.get_num_threads() >= num_cores else 0.0


def make_registry(entries: Mapping[str, Entry], summaries: Mapping[str, Summary]) -> Registry:
    """Return what can be asked for: what names mean now."""
    return Registry(Registered(entries[name], summary) for name, summary in summaries.items())


def _meaning(registry: Registry, reference: str) -> Summary | None:
    found = meanings(registry, reference)
    return found[0].summary if len(found) == 1 else None


def _absence(registry: Registry, reference: str) -> str:
    return str(FaultyAdapterError(faulty)) if (faulty := registry.fault_of(reference)) else f"there is no adapter {reference!r}"


def make_pool(
    base: BaseModel, registry: Registry, num_slots: int, may_grow: bool = False, max_rank: int | None = None
) -> AdapterPool:
    """Return a pool for the adapters that are registered: of their bases and their greatest rank.

    With `may_grow` others may come: on these bases or the shared default one, and of rank `max_rank` at most. Raises
    `AdapterError` where adapters of a higher rank are there already.
    """
    found = [*registry.by_name.values()]
    bases = list(dict.fromkeys([*map(_basis, found), *([Seeded()] if may_grow else [])]))
    rank = max((of.summary.max_rank for of in found), default=NEW_RANK if may_grow else 0)
    if may_grow and max_rank:
        for of in found:
            if of.summary.max_rank > max_rank:
                raise AdapterError(f"--max-rank is {max_rank}, and {of.summary.name!r} has rank {of.summary.max_rank}")
        rank = max_rank
    return AdapterPool(base.identity.shapes, bases, rank, num_slots, base.model.dtype, base.model.device)


def make_grammars(base: BaseModel) -> Grammars | None:
    """Return what compiles grammars for a base model; None where its answers cannot follow one, which the log then says."""
    num_tokens = base.model.config.get_text_config().vocab_size
    try:
        return Grammars(base.tokenizer.backend_tokenizer, num_tokens, _stop_ids(base))
    except GrammarError as error:
        logger.warning("no answer can be made to fit a JSON schema, a regular expression or a grammar: %s", error)
        return None


def _reserve(pool: AdapterPool, num_bytes: int) -> None:
    try:
        pool.reserve(num_bytes)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(f"--resident-gib: there is no room for adapters: {' '.join(str(error).split())}") from error


def _likely_bytes(base: BaseModel, registry: Registry, pool: AdapterPool, max_resident: int) -> int:
    # Of all registered adapters and some merges, at what the largest takes; where there are none, of some that keep a tenth.
    kept = [of.summary.num_kept for of in registry.by_name.values()]
    most = max(kept, default=_usual_kept(pool))
    return int(most * BYTES_PER_ENTRY[base.model.dtype] * min(max_resident, len(kept) + NUM_MERGES))


def _max_kept(base: BaseModel, settings: Settings) -> float:
    # An entry has a value and a column of a byte at least; what a slice is filled up with comes on top.
    return settings.resident_gib * GIB / (base.model.dtype.itemsize + 1)


def _basis(of: Registered) -> Basis:
    said = of.summary.basis
    return of.entry.basis(said.digest) if isinstance(said, ExplicitConfig) else said.basis()


def _log(
    base: BaseModel, quantization: Quantization | None, num_adapters: int, runner: Runner, num_kv_tokens: int, limits: StepLimits
) -> None:
    dtype, device = base.model.dtype, base.model.device
    products = "C++" if has_native(dtype, device) else "torch"
    if quantization:
        products = f"{products} on weights in {quantization}"
    logger.info(
        "%s in %s on %s, %d threads; products in %s, attention in %s, deltas in %s; %d adapters; room for %d tokens in %.0f MiB",
        base.name,
        _name(dtype),
        device_name(device),
        torch.get_num_threads(),
        products,
        runner.attention,
        description() if device.type == "cpu" else "Triton",
        num_adapters,
        num_kv_tokens,
        runner.num_kv_bytes / 2**20,
    )
    logger.info("a step in which one sequence decodes takes %.1f ms", 1e3 * limits.cost.decoding(1))
    logger.debug("what steps cost: %s", limits.cost)
    if not MODULE and device.type == "cpu":
        logger.warning(
            "SLOW: %s. Until then deltas take several times as long, the more adapters share a batch, and adapters more memory.",
            MISSING,
        )


def _outline(base: BaseModel) -> str:
    """Return the model, its dtype and device, and on a CPU the instruction set of the kernels."""
    dtype, device = base.model.dtype, base.model.device
    code = "" if device.type != "cpu" else f" with {choose()}" if MODULE else " with torch alone"
    return f"{base.name} in {_name(dtype)} on {device_name(device)}{code}"


def _capacity(base: BaseModel, registry: Registry, pool: AdapterPool, settings: Settings) -> str:
    """Return how many adapters there are, and how many like them the kernels' memory holds."""
    if not pool.has_operands:
        return "no adapters"
    kept = [of.summary.num_kept for of in registry.by_name.values()]
    mean = sum(kept) / len(kept) if kept else _usual_kept(pool)
    count = int(settings.resident_gib * GIB / max(1.0, mean * BYTES_PER_ENTRY[base.model.dtype]))
    fits = f"about {count}" if count < settings.max_resident else f"the {settings.max_resident} of --max-resident"
    like = "of these" if kept else f"of rank {pool.rank}"
    return f"{len(kept) or 'no'} adapter{'s' * (len(kept) != 1)}; {settings.resident_gib} GiB for adapters holds {fits} {like}"


def _usual_kept(pool: AdapterPool) -> float:
    return NEW_DENSITY * sum(layout.num_outputs * layout.rank for layout in pool.layouts.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _num_blocks(settings: Settings, base: BaseModel) -> int:
    num_bytes = bytes_per_token(base.model) * settings.block_size
    num_blocks = int(settings.kv_cache_gib * GIB) // num_bytes - NUM_SPARE_BLOCKS[base.model.device.type]
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
