"""Construction of a service from settings: base model, adapters, engine."""

import atexit
import gc
import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from math import inf
from pathlib import Path

import torch

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.basis import Basis, Seeded
from lori.config import ExplicitConfig
from lori.device import device_name, resolve_device
from lori.errors import AdapterError, ModelError
from lori.flags import package_version
from lori.kernels.native import MISSING, MODULE, choose, description, max_isa
from lori.named_merge import NamedMerge
from lori.names import EMBEDDED_NAME, base_aliases
from lori.packed_adapter import PackedReader
from lori.pool import AdapterPool
from lori.printable import printable
from lori.projection import Quantization, has_native
from lori.prompt_statistics import Background, find_background
from lori.resources import BackgroundLoad, use_threads, warn_if_busy
from lori.store.entry import Entry
from lori.store.remote_folder import redacted
from lori.summary import Summary
from server.access.key_ring import KeyRing
from server.access.policy import check_policies
from server.catalog.files import AdapterFiles
from server.catalog.fit import Fit
from server.catalog.inventory import take_inventory
from server.catalog.stores import open_stores
from server.engine.adapter_selection import AdapterSelector
from server.engine.adapters.cache import AdapterCache
from server.engine.adapters.loader import Loader
from server.engine.adapters.registry import FaultyAdapterError, Registered, Registry, candidates
from server.engine.adapters.residents import Residents
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.grammar import GrammarError
from server.engine.model.families import check_family
from server.engine.model.prompt_probe import PromptProbe
from server.engine.model.runner import Runner, bytes_per_token
from server.engine.prompt_weights import PromptWeigher
from server.engine.sampling.grammars import Grammars
from server.engine.sampling.sampler import Sampler
from server.engine.scheduling.kv_cache import KvCache
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.step_budget import StepLimits
from server.engine.startup import check_logits, measure_step_cost, reference_logits
from server.engine.step import StepExecutor
from server.engine.thread import EngineThread
from server.service.merge_admin import MergeAdmin
from server.service.named_merges import NamedMerges, read_merges
from server.service.service import Service
from server.settings import Settings
from server.telemetry.gauges import make_metrics

logger = logging.getLogger(__name__)
MIN_CONTEXT = 16
"""Tokens of KV memory below which the server does not start."""
GIB = 2**30
BYTES_PER_ENTRY = {torch.bfloat16: 4.5, torch.float32: 6.5}
"""Bytes of a resident adapter per nonzero entry of B: a little more than was measured at 10% density."""
PATIENCE_S = 0.005
"""Seconds that a step waits for an adapter that is being read: about as long as a read takes."""
NUM_SPARE_BLOCKS = {"cpu": 0, "cuda": 1}
"""Blocks of KV memory that no sequence owns (see `GpuOps`), by device type."""
NEW_RANK, NEW_DENSITY = 32, 0.1
"""Likely rank and density of adapters that come while the server runs, if there is none at start."""
NUM_FETCHED = 8
"""Adapters that are fetched from a remote store at once. They wait for the network, not for a core."""
BYTES_PER_PART = 8
"""Bytes of each entry of an adapter that is read for a merge: a position and a value."""
MAX_NAMED = 10
"""Adapters that a warning names."""
NUM_MERGES = 32
"""Merges that are no sums for which room is reserved from the start."""


def load_service(settings: Settings, num_ingresses: int = 0) -> Service:
    """Load the model and the adapters, and return the service.

    `num_ingresses` is the number of ingresses in front of this process, see `Service`. Raises `LoriError` if there is no model,
    if an adapter is not sound or if the model cannot be served. Raises `KeyFileError` if the key file is not sound.
    """
    max_isa()  # refuses an unknown instruction set before anything is loaded, on a GPU too
    keys = KeyRing(settings.keys) if settings.keys else None
    own_store, demo_store = open_stores(settings)  # reports an unreachable store before the model is loaded
    use_threads(settings.threads)
    load = BackgroundLoad()
    device = resolve_device(settings.device)
    dtype = _dtype(settings.dtype, device)
    logger.info("loading %s in %s on %s …", settings.model or EMBEDDED_NAME, _name(dtype), device_name(device))
    # The model's own attention only computes the expected logits. Not every family has another one than the eager one.
    base = load_base_model(settings.model, dtype, "eager", device)
    check_family(base.model)
    background = find_background(base.identity, settings.background)
    aliases = base_aliases(settings.model)
    base_names = aliases | {base.name}
    named_merges = _merges_of_folder(settings.merges, base.identity.digest, base_names) if settings.merges else {}
    if own_store:
        logger.info("reading the adapters in %s …", redacted(str(settings.adapters)))
    inventory = take_inventory(own_store, demo_store, base.identity, is_strict=settings.strict)
    registry = make_registry(inventory.entries, inventory.summaries)
    registry.add_faulty(inventory.faulty)
    merges = NamedMerges(named_merges, lambda name: name in registry.by_name or name in registry.faulty)
    logger.info("preparing the model for %d adapters, and checking it against transformers …", len(registry.by_name))
    expected = reference_logits(base.model)
    pool = make_pool(base, registry, settings.max_resident, own_store is not None, settings.max_rank)
    num_blocks = _num_blocks(settings, base)
    runner = Runner(base.model, pool, num_blocks, settings.block_size, settings.max_batch, settings.quantization)
    _reserve(pool, min(int(settings.resident_gib * GIB), _likely_bytes(base, registry, pool, settings.max_resident)))
    max_context = min(base.model.config.get_text_config().max_position_embeddings, num_blocks * settings.block_size)
    check_logits(runner, base.model, expected, max_context, settings.block_size)
    if not settings.threads and device.type == "cpu":
        warn_if_busy(load)
    logger.info("timing steps …")
    limits = _limits(settings, base, runner, max_context, num_blocks)
    if device.type == "cuda":  # only now: the cost model must time steps with prompts as they run, not as replayed CUDA graphs
        runner.prepare()
        check_logits(runner, base.model, expected, max_context, settings.block_size)
    residents = Residents(settings.max_resident, int(settings.resident_gib * GIB))
    reader = PackedReader(base.identity, pool.layouts)
    files = AdapterFiles(own_store, demo_store, reader, Fit.from_pool(pool), settings.max_upload_bytes)
    others, damaged = files.others(registry.by_name.values(), inventory.faulty)
    registry.add(others)
    registry.add_faulty(damaged)
    _warn_of_merges(merges, registry)
    if keys:
        keys.add_check(
            lambda new_keys: check_policies(new_keys, partial(_meaning, registry), registry.by_name, partial(_absence, registry))
        )
        logger.info("%s", keys.keys)
    loader = Loader(registry, reader, NUM_FETCHED)
    adapter_cache = AdapterCache(pool, residents, loader, int(settings.loaded_gib * GIB), max_load_wait_s=_patience_s(device))
    cache = KvCache(num_blocks, settings.block_size, base.identity.digest)
    max_priority_wait_s = settings.max_priority_wait_s or inf
    scheduler = Scheduler(cache, adapter_cache, limits, max_priority_wait_s)
    grammars = make_grammars(base)
    _log(base, settings.quantization, len(registry.by_name), runner, num_blocks * settings.block_size, limits)
    # The objects that exist now stay. The garbage collector, which stops the world, need not scan them again and again.
    gc.collect()
    gc.freeze()
    # At exit the collector must scan them: remaining cycles hold objects of libtriton, which torch imports where it is installed,
    # and nanobind would report them as leaks.
    atexit.register(gc.unfreeze)
    num_ids = base.model.config.get_text_config().vocab_size
    weigher = _make_weigher(base, runner, max_priority_wait_s) if background else None
    engine = Engine(
        scheduler, runner, adapter_cache, base.tokenizer.backend_tokenizer, _stop_ids(base), grammars=grammars, weigher=weigher
    )
    admission = Admission(
        base.tokenizer,
        registry,
        max_context,
        settings.max_resident,
        _max_nnz(base, settings),
        num_ids,
        grammars,
        max_merge_nnz=settings.resident_gib * GIB / BYTES_PER_PART,
        background=background,
        weighs_by_default=settings.default_merge == "auto",
    )
    _warn_of_statistics(admission, registry)
    max_selected, threshold = settings.auto_max_adapters, settings.auto_threshold
    return Service(
        settings=settings,
        base_model=base.name,
        fingerprint=fingerprint(base.model.dtype, base.model.device, settings.quantization, weighing_name(settings, background)),
        base_aliases=aliases,
        registry=registry,
        admission=admission,
        engine=EngineThread(engine, settings.max_step_s),
        metrics=make_metrics(base.name, registry, scheduler, adapter_cache),
        keys=keys,
        num_ingresses=num_ingresses,
        required=lambda: [name for tenant in keys.keys.tenants.values() for name, _ in tenant.policy] if keys else [],
        files=files,
        merge_admin=MergeAdmin(
            merges,
            settings.merges,
            base.identity.digest,
            base_names,
            lambda reference: bool(candidates(registry, reference)),
        ),
        outline=f"{_outline(base)}, {_capacity(base, registry, pool, settings)}",
        selector=AdapterSelector(registry, admission, background, max_selected, threshold) if background else None,
    )


def _limits(settings: Settings, base: BaseModel, runner: Runner, max_context: int, num_blocks: int) -> StepLimits:
    try:
        cost = measure_step_cost(
            StepExecutor(runner, Sampler(_stop_ids(base))),
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
        short_step_s=cost.short_step_seconds() if settings.short_step_ms is None else settings.short_step_ms / 1000,
        cost=cost,
    )


def _make_weigher(base: BaseModel, runner: Runner, max_priority_wait_s: float) -> PromptWeigher:
    try:
        probe = PromptProbe(runner.decoder, base.model.dtype, base.model.device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(f"there is no room for automatic weights: {' '.join(str(error).split())}") from error
    logger.info("automatic weights: prompts are probed with %.0f MiB of keys and values", probe.num_bytes / 2**20)
    return PromptWeigher(probe, runner.is_broken, max_priority_wait_s)


def _warn_of_statistics(admission: Admission, registry: Registry) -> None:
    can_weigh = admission.weights.can_weigh
    adapters = [adapter.summary for adapter in registry.by_name.values()]
    # An adapter may have several names.
    if names := sorted({adapter.name for adapter in adapters if adapter.prompt_statistics and not can_weigh(adapter)}):
        logger.warning(
            "automatic weights: %d adapters have statistics of another background than the server's (--background): %s%s",
            len(names),
            ", ".join(names[:MAX_NAMED]),
            ", …" if len(names) > MAX_NAMED else "",
        )


def _patience_s(device: torch.device) -> float:
    # If a step takes every core, it takes the loader's, too, and an adapter that is half read would wait for the step after it.
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return PATIENCE_S if device.type == "cpu" and torch.get_num_threads() >= num_cores else 0.0


def make_registry(entries: Mapping[str, Entry], summaries: Mapping[str, Summary]) -> Registry:
    """Return the registry of the adapters that requests can name."""
    return Registry(Registered(entries[name], summary) for name, summary in summaries.items())


def _meaning(registry: Registry, reference: str) -> Summary | None:
    adapters = candidates(registry, reference)
    return adapters[0].summary if len(adapters) == 1 else None


def _absence(registry: Registry, reference: str) -> str:
    return (
        str(FaultyAdapterError(faulty)) if (faulty := registry.find_faulty(reference)) else f"there is no adapter {reference!r}"
    )


def make_pool(
    base: BaseModel, registry: Registry, num_slots: int, may_grow: bool = False, max_rank: int | None = None
) -> AdapterPool:
    """Return a pool for the registered adapters: with their bases and their highest rank.

    With `may_grow` more adapters may come later: on these bases or the shared default one, with a rank up to `max_rank`. Raises
    `AdapterError` if a registered adapter has a higher rank.
    """
    adapters = [*registry.by_name.values()]
    bases = list(dict.fromkeys([*map(_basis, adapters), *([Seeded()] if may_grow else [])]))
    rank = max((adapter.summary.max_rank for adapter in adapters), default=NEW_RANK if may_grow else 0)
    if may_grow and max_rank:
        for adapter in adapters:
            if adapter.summary.max_rank > max_rank:
                raise AdapterError(f"--max-rank is {max_rank}, and {adapter.summary.name!r} has rank {adapter.summary.max_rank}")
        rank = max_rank
    return AdapterPool(base.identity.shapes, bases, rank, num_slots, base.model.dtype, base.model.device)


def make_grammars(base: BaseModel) -> Grammars | None:
    """Return the grammar compiler of a base model. Returns None, and logs why, if its answers cannot follow grammars."""
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
    # Room for all registered adapters and some merges, each as large as the largest adapter. Without adapters, each has the usual
    # size.
    nnz = [adapter.summary.nnz for adapter in registry.by_name.values()]
    most = max(nnz, default=_usual_nnz(pool))
    return int(most * BYTES_PER_ENTRY[base.model.dtype] * min(max_resident, len(nnz) + NUM_MERGES))


def _max_nnz(base: BaseModel, settings: Settings) -> float:
    # An entry has a value and at least one byte for its column. The padding of slices comes on top.
    return settings.resident_gib * GIB / (base.model.dtype.itemsize + 1)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`. "auto" is bf16 wherever that is faster than fp32.

    Our products in bf16 read half the bytes of torch's in fp32, with or without the CPU's instructions for bf16. Without AVX2
    they compute too slowly.
    """
    if name == "auto" and has_native(torch.bfloat16, device) and choose() != "portable":
        return torch.bfloat16
    return resolve_dtype(name, device)


def _basis(adapter: Registered) -> Basis:
    config = adapter.summary.basis
    return adapter.entry.basis(config.digest) if isinstance(config, ExplicitConfig) else config.basis()


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
    logger.info(
        "a step in which one sequence decodes takes %.1f ms; one with a few short prompts may take %.0f ms",
        1e3 * limits.cost.decoding(1),
        1e3 * limits.short_step_s,
    )
    logger.debug("what steps cost: %s", limits.cost)
    if not MODULE and device.type == "cpu":
        logger.warning(
            "SLOW: %s. Until then deltas take several times as long, the more adapters share a batch, and adapters more memory.",
            MISSING,
        )


def _outline(base: BaseModel) -> str:
    """Return the model, its dtype and device, and on a CPU the kernels' instruction set."""
    dtype, device = base.model.dtype, base.model.device
    code = "" if device.type != "cpu" else f" with {choose()}" if MODULE else " with torch alone"
    return f"{base.name} in {_name(dtype)} on {device_name(device)}{code}"


def _merges_of_folder(folder: Path, base_digest: str, base_names: Collection[str]) -> Mapping[str, NamedMerge]:
    try:
        return read_merges(folder, base_digest, base_names)
    except OSError as error:
        raise AdapterError(f"--merges: {printable(str(folder))} cannot be read: {error.strerror}") from error


def _warn_of_merges(merges: NamedMerges, registry: Registry) -> None:
    for name, merge in merges.usable(lambda _: True).items():  # warns of those whose names adapters have
        if absent := [one.reference for one in merge.adapters if not candidates(registry, one.reference)]:
            logger.warning("requests for the merge %r will fail, since there is no %s", name, ", ".join(absent))


def fingerprint(dtype: torch.dtype, device: torch.device, quantization: Quantization | None, weighing: str = "") -> str:
    """Return the name of what computes answers: version, instruction set or GPU, dtype, quantization, torch if it computes.

    `weighing` is the name of what computes automatic weights, and comes last.
    """
    if device.type == "cuda":
        code = "sm{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        code = choose() if MODULE else "portable"
    parts = [f"lori-{package_version()}", code, _name(dtype), quantization or ""]
    if not has_native(dtype, device):
        parts.append(f"torch-{torch.__version__}-{torch.backends.cpu.get_cpu_capability().lower()}")
    return "-".join(filter(None, [*parts, weighing]))


def weighing_name(settings: Settings, background: Background | None) -> str:
    """Return a name of the background and the options that decide automatic weights; empty if there is no background."""
    if not background:
        return ""
    parts = (background.digest, settings.default_merge, settings.auto_max_adapters, settings.auto_threshold)
    return f"auto-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def _capacity(base: BaseModel, registry: Registry, pool: AdapterPool, settings: Settings) -> str:
    """Return the number of adapters, and how many like them fit into the kernels' memory."""
    if not pool.has_operands:
        return "no adapters"
    nnz = [adapter.summary.nnz for adapter in registry.by_name.values()]
    mean = sum(nnz) / len(nnz) if nnz else _usual_nnz(pool)
    count = int(settings.resident_gib * GIB / max(1.0, mean * BYTES_PER_ENTRY[base.model.dtype]))
    fits = f"about {count}" if count < settings.max_resident else f"the {settings.max_resident} of --max-resident"
    like = "of these" if nnz else f"of rank {pool.rank}"
    return f"{len(nnz) or 'no'} adapter{'s' * (len(nnz) != 1)}; {settings.resident_gib} GiB for adapters holds {fits} {like}"


def _usual_nnz(pool: AdapterPool) -> float:
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
