"""Construction of a service from settings: base model, adapters, engine."""

import atexit
import gc
import hashlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path

import torch

from lori.base_model import BaseModel
from lori.device import device_name
from lori.errors import AdapterError
from lori.flags import package_version
from lori.named_merge import NamedMerge
from lori.names import base_aliases
from lori.native import MISSING, MODULE, choose, description, max_isa
from lori.packed_adapter import PackedReader
from lori.printable import printable
from lori.projection import Quantization, has_native
from lori.prompt_statistics import Background, find_background
from lori.resources import BackgroundLoad, use_threads
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
from server.engine.sampling.grammars import Grammars
from server.engine.scheduling.kv_cache import KvCache
from server.engine.scheduling.scheduler import Scheduler
from server.engine.thread import EngineThread
from server.served_model import (
    ServedModel,
    describe_capacity,
    dtype_name,
    load_base,
    make_grammars,
    make_weigher,
    prepare_model,
    stop_ids,
)
from server.service.merge_admin import MergeAdmin
from server.service.named_merges import NamedMerges, read_merges
from server.service.service import Service
from server.settings import GIB, Settings
from server.telemetry.gauges import make_metrics

logger = logging.getLogger(__name__)
PATIENCE_S = 0.005
"""Seconds that a step waits for an adapter that is being read: about as long as a read takes."""
NUM_FETCHED = 8
"""Adapters that are fetched from a remote store at once. They wait for the network, not for a core."""
BYTES_PER_PART = 8
"""Bytes of each entry of an adapter that is read for a merge: a position and a value."""
MAX_NAMED = 10
"""Adapters that a warning names."""


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
    base = load_base(settings)
    background = find_background(base.identity, settings.background)
    aliases = base_aliases(settings.model)
    base_names = aliases | {base.name}
    named_merges = _merges_of_folder(settings.merges, base.identity.digest, base_names) if settings.merges else {}
    if own_store:
        logger.info("reading the adapters in %s …", redacted(str(settings.adapters)))
    inventory = take_inventory(own_store, demo_store, base.identity, is_strict=settings.strict)
    registry = make_registry(inventory.entries, inventory.summaries)
    registry.add_faulty(inventory.faulty)
    merges = NamedMerges(
        named_merges,
        lambda name: name in registry.by_name or name in registry.faulty,
        lambda reference: bool(candidates(registry, reference)),
    )
    model = prepare_model(settings, base, registry, load, may_grow=own_store is not None)
    reader = PackedReader(base.identity, model.pool.layouts)
    files = AdapterFiles(own_store, demo_store, reader, Fit.from_pool(model.pool), settings.max_upload_bytes)
    others, damaged = files.others(registry.by_name.values(), inventory.faulty)
    registry.add(others)
    registry.add_faulty(damaged)
    _warn_of_merges(merges)
    if keys:
        keys.add_check(
            lambda new_keys: check_policies(new_keys, partial(_meaning, registry), registry.by_name, partial(_absence, registry))
        )
        logger.info("%s", keys.keys)
    grammars = make_grammars(base)
    _log(model, settings, len(registry.by_name))
    _freeze()
    engine = _make_engine(settings, model, Loader(registry, reader, NUM_FETCHED), grammars, can_weigh=background is not None)
    admission = _make_admission(settings, model, registry, grammars, background)
    _log_statistics(admission, registry)
    max_selected, threshold = settings.auto_max_adapters, settings.auto_threshold
    return Service(
        settings=settings,
        base_model=base.name,
        fingerprint=fingerprint(base.model.dtype, base.model.device, settings.quantization, weighing_name(settings, background)),
        base_aliases=aliases,
        registry=registry,
        admission=admission,
        engine=EngineThread(engine, settings.max_step_s),
        metrics=make_metrics(base.name, registry, engine.scheduler, engine.adapter_cache),
        keys=keys,
        num_ingresses=num_ingresses,
        required=lambda: [name for tenant in keys.keys.tenants.values() for name, _ in tenant.policy] if keys else [],
        files=files,
        merge_admin=MergeAdmin(
            merges,
            settings.merges,
            base.identity.digest,
            base_names,
        ),
        outline=f"{_outline(base)}, {describe_capacity(base, registry, model.pool, settings)}",
        selector=AdapterSelector(registry, admission, background, max_selected, threshold) if background else None,
    )


def _make_admission(
    settings: Settings, model: ServedModel, registry: Registry, grammars: Grammars | None, background: Background | None
) -> Admission:
    return Admission(
        model.base.tokenizer,
        registry,
        model.max_context,
        settings.max_resident,
        _max_nnz(model.base, settings),
        model.base.model.config.get_text_config().vocab_size,
        grammars,
        max_merge_nnz=settings.resident_gib * GIB / BYTES_PER_PART,
        background=background,
        default_merge=settings.default_merge,
    )


def _make_engine(settings: Settings, model: ServedModel, loader: Loader, grammars: Grammars | None, *, can_weigh: bool) -> Engine:
    base, max_priority_wait_s = model.base, settings.max_priority_wait_s or inf
    residents = Residents(settings.max_resident, int(settings.resident_gib * GIB))
    patience_s = _patience_s(base.model.device)
    adapter_cache = AdapterCache(model.pool, residents, loader, int(settings.loaded_gib * GIB), max_load_wait_s=patience_s)
    cache = KvCache(model.num_blocks, settings.block_size, base.identity.digest)
    return Engine(
        Scheduler(cache, adapter_cache, model.limits, max_priority_wait_s),
        model.runner,
        adapter_cache,
        base.tokenizer.backend_tokenizer,
        stop_ids(base),
        grammars=grammars,
        weigher=make_weigher(base, model.runner, max_priority_wait_s) if can_weigh else None,
    )


def _freeze() -> None:
    # The objects that exist now stay. The garbage collector, which stops the world, need not scan them again and again.
    gc.collect()
    gc.freeze()
    # At exit the collector must scan them: remaining cycles hold objects of libtriton, which torch imports where it is installed,
    # and nanobind would report them as leaks.
    atexit.register(gc.unfreeze)


def _log_statistics(admission: Admission, registry: Registry) -> None:
    """Log which adapters cannot have automatic weights, if the server has a background."""
    if not admission.weights.background:
        return
    num_all = len(registry.by_name)
    without = [one.summary for one in registry.by_name.values() if not admission.weights.can_weigh(one.summary)]
    if other := sorted(adapter.name for adapter in without if adapter.prompt_statistics):
        message = (
            "automatic weights: %d of %d adapters have statistics of another background than the server's (--background): %s"
        )
        logger.warning(message, len(other), num_all, _listed(other))
    if absent := sorted(adapter.name for adapter in without if not adapter.prompt_statistics):
        message = "automatic weights: %d of %d adapters have no statistics of their prompts (python -m training.calibrate): %s"
        logger.info(message, len(absent), num_all, _listed(absent))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (", …" if len(names) > MAX_NAMED else "")


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


def _max_nnz(base: BaseModel, settings: Settings) -> float:
    # An entry has a value and at least one byte for its column. The padding of slices comes on top.
    return settings.resident_gib * GIB / (base.model.dtype.itemsize + 1)


def _log(model: ServedModel, settings: Settings, num_adapters: int) -> None:
    base, limits = model.base, model.limits
    dtype, device = base.model.dtype, base.model.device
    products = "C++" if has_native(dtype, device) else "torch"
    if settings.quantization:
        products = f"{products} on weights in {settings.quantization}"
    logger.info(
        "%s in %s on %s, %d threads; products in %s, attention in %s, deltas in %s; %d adapters; room for %d tokens in %.0f MiB",
        base.name,
        dtype_name(dtype),
        device_name(device),
        torch.get_num_threads(),
        products,
        model.runner.attention,
        description() if device.type == "cpu" else "Triton",
        num_adapters,
        model.num_blocks * settings.block_size,
        model.runner.num_kv_bytes / 2**20,
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
    return f"{base.name} in {dtype_name(dtype)} on {device_name(device)}{code}"


def _merges_of_folder(folder: Path, base_digest: str, base_names: Collection[str]) -> Mapping[str, NamedMerge]:
    try:
        return read_merges(folder, base_digest, base_names)
    except OSError as error:
        raise AdapterError(f"--merges: {printable(str(folder))} cannot be read: {error.strerror}") from error


def _warn_of_merges(merges: NamedMerges) -> None:
    for name, merge in merges.usable(lambda _: True).items():  # warns of those whose names adapters have
        if missing := merges.missing(merge):
            logger.warning("requests for the merge %r will fail, since there is no %s", name, ", ".join(missing))


def fingerprint(dtype: torch.dtype, device: torch.device, quantization: Quantization | None, weighing: str = "") -> str:
    """Return the name of what computes answers: version, instruction set or GPU, dtype, quantization, torch if it computes.

    `weighing` is the name of what computes automatic weights, and comes last.
    """
    if device.type == "cuda":
        code = "sm{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        code = choose() if MODULE else "portable"
    parts = [f"lori-{package_version()}", code, dtype_name(dtype), quantization or ""]
    if not has_native(dtype, device):
        parts.append(f"torch-{torch.__version__}-{torch.backends.cpu.get_cpu_capability().lower()}")
    return "-".join(filter(None, [*parts, weighing]))


def weighing_name(settings: Settings, background: Background | None) -> str:
    """Return a name of the background and the options that decide automatic weights; empty if there is no background."""
    if not background:
        return ""
    parts = (background.digest, settings.default_merge, settings.auto_max_adapters, settings.auto_threshold)
    return f"auto-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"
