"""The base model as it is served: loaded, made ready for adapters, checked against transformers, and timed.

Also what is made for one base model: the pool of adapters, the grammar compiler and the prompt weigher.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.basis import Basis, Seeded
from lori.config import ExplicitConfig
from lori.device import device_name, resolve_device
from lori.errors import AdapterError, ModelError
from lori.names import EMBEDDED_NAME
from lori.native import choose
from lori.pool import AdapterPool
from lori.projection import has_native
from lori.resources import BackgroundLoad, warn_if_busy
from server.engine.adapters.registry import Registered, Registry
from server.engine.grammar import GrammarError
from server.engine.model.families import check_family
from server.engine.model.prompt_probe import PromptProbe
from server.engine.model.runner import Runner, bytes_per_token
from server.engine.prompt_weights import PromptWeigher
from server.engine.sampling.grammars import Grammars
from server.engine.sampling.sampler import Sampler
from server.engine.scheduling.step_budget import StepLimits
from server.engine.startup import check_logits, measure_step_cost, reference_logits
from server.engine.step import StepExecutor
from server.settings import GIB, Settings

logger = logging.getLogger(__name__)
MIN_CONTEXT = 16
"""Tokens of KV memory below which the server does not start."""
BYTES_PER_ENTRY = {torch.bfloat16: 4.5, torch.float32: 6.5}
"""Bytes of a resident adapter per nonzero entry of B: a little more than was measured at 10% density."""
NUM_SPARE_BLOCKS = {"cpu": 0, "cuda": 1}
"""Blocks of KV memory that no sequence owns (see `GpuOps`), by device type."""
NEW_RANK, NEW_DENSITY = 32, 0.1
"""Likely rank and density of adapters that come while the server runs, if there is none at start."""
NUM_MERGES = 32
"""Merges that are no sums for which room is reserved from the start."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A base model that is ready to compute steps with adapters."""

    base: BaseModel
    pool: AdapterPool
    runner: Runner
    num_blocks: int
    """Blocks of KV memory."""
    max_context: int
    """Maximum tokens of a sequence."""
    limits: StepLimits


def load_base(settings: Settings) -> BaseModel:
    """Load the base model on its device. Raises `ModelError` if there is none, or its family cannot be served."""
    device = resolve_device(settings.device)
    dtype = _dtype(settings.dtype, device)
    logger.info("loading %s in %s on %s …", settings.model or EMBEDDED_NAME, dtype_name(dtype), device_name(device))
    # The model's own attention only computes the expected logits. Not every family has another one than the eager one.
    base = load_base_model(settings.model, dtype, "eager", device)
    check_family(base.model)
    return base


def prepare_model(
    settings: Settings, base: BaseModel, registry: Registry, load: BackgroundLoad, *, may_grow: bool
) -> ServedModel:
    """Return the model, ready for the registered adapters, and with `may_grow` for more. Warns if `load` slows it down.

    Raises `ModelError` if there is too little memory or the logits are not those of transformers. Raises as `make_pool`.
    """
    logger.info("preparing the model for %d adapters, and checking it against transformers …", len(registry.by_name))
    expected = reference_logits(base.model)
    pool = make_pool(base, registry, settings.max_resident, may_grow, settings.max_rank)
    num_blocks = _num_blocks(settings, base)
    runner = Runner(base.model, pool, num_blocks, settings.block_size, settings.max_batch, settings.quantization)
    _reserve(pool, min(int(settings.resident_gib * GIB), _likely_bytes(base, registry, pool, settings.max_resident)))
    max_context = min(base.model.config.get_text_config().max_position_embeddings, num_blocks * settings.block_size)
    check_logits(runner, base.model, expected, max_context, settings.block_size)
    if not settings.threads and base.model.device.type == "cpu":
        warn_if_busy(load)
    logger.info("timing steps …")
    limits = _limits(settings, base, runner, max_context, num_blocks)
    # Only now: the cost model must time steps with prompts as they run, not as replayed CUDA graphs.
    if base.model.device.type == "cuda":
        runner.prepare()
        check_logits(runner, base.model, expected, max_context, settings.block_size)
    return ServedModel(base, pool, runner, num_blocks, max_context, limits)


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
        return Grammars(base.tokenizer.backend_tokenizer, num_tokens, stop_ids(base))
    except GrammarError as error:
        logger.warning("no answer can be made to fit a JSON schema, a regular expression or a grammar: %s", error)
        return None


def make_weigher(base: BaseModel, runner: Runner, max_priority_wait_s: float) -> PromptWeigher:
    """Return the prompt weigher of a base model. Raises `ModelError` if there is no room for it."""
    try:
        probe = PromptProbe(runner.decoder, base.model.dtype, base.model.device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(f"there is no room for automatic weights: {' '.join(str(error).split())}") from error
    logger.info("automatic weights: prompts are probed with %.0f MiB of keys and values", probe.num_bytes / 2**20)
    return PromptWeigher(probe, runner.is_broken, max_priority_wait_s)


def describe_capacity(base: BaseModel, registry: Registry, pool: AdapterPool, settings: Settings) -> str:
    """Return the number of adapters, and how many like them fit into the kernels' memory."""
    if not pool.has_operands:
        return "no adapters"
    nnz = [adapter.summary.nnz for adapter in registry.by_name.values()]
    mean = sum(nnz) / len(nnz) if nnz else _usual_nnz(pool)
    count = int(settings.resident_gib * GIB / max(1.0, mean * BYTES_PER_ENTRY[base.model.dtype]))
    fits = f"about {count}" if count < settings.max_resident else f"the {settings.max_resident} of --max-resident"
    like = "of these" if nnz else f"of rank {pool.rank}"
    return f"{len(nnz) or 'no'} adapter{'s' * (len(nnz) != 1)}; {settings.resident_gib} GiB for adapters holds {fits} {like}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype, without `torch.`."""
    return str(dtype).removeprefix("torch.")


def stop_ids(base: BaseModel) -> Iterable[int]:
    """Return the ids of the tokens that end an answer."""
    configured = base.model.generation_config.eos_token_id if base.model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in (*ids, base.tokenizer.eos_token_id) if i is not None}


def _limits(settings: Settings, base: BaseModel, runner: Runner, max_context: int, num_blocks: int) -> StepLimits:
    try:
        cost = measure_step_cost(
            StepExecutor(runner, Sampler(stop_ids(base))),
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


def _usual_nnz(pool: AdapterPool) -> float:
    return NEW_DENSITY * sum(layout.num_outputs * layout.rank for layout in pool.layouts.values())


def _num_blocks(settings: Settings, base: BaseModel) -> int:
    num_bytes = bytes_per_token(base.model) * settings.block_size
    num_blocks = int(settings.kv_cache_gib * GIB) // num_bytes - NUM_SPARE_BLOCKS[base.model.device.type]
    if num_blocks * settings.block_size < MIN_CONTEXT:
        raise ModelError(
            f"--kv-cache-gib {settings.kv_cache_gib:g} holds {num_blocks * settings.block_size} tokens of {base.name}, "
            f"expected at least {MIN_CONTEXT}"
        )
    return num_blocks


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
