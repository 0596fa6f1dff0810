"""The plan: memory of a replica, its flags, the number of replicas, and the assumptions."""

import math
import shlex
from dataclasses import dataclass

import torch

from lori.errors import LoriError
from server.engine.adapters.cache import MAX_LOADING
from server.plan.config import PlanConfig
from server.plan.memory import GIB, AdapterSizes, ModelSizes, adapter_sizes, basis_bytes, gib, model_sizes
from server.plan.speed import HELD_FACTOR, MEASURED, MODEL, RESERVED_FACTOR, Ratio, Speed
from server.settings import Settings

SERVER = "python -m server"
MAX_RESIDENT = 65536
"""Maximum of `--max-resident`."""


class PlanError(LoriError):
    """The requested plan is impossible."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one replica, in bytes, by purpose."""

    weights: int
    basis: int
    kv_cache: int
    loaded: int
    process: int
    resident: int

    @property
    def fixed(self) -> int:
        """All memory but that of the resident adapters."""
        return self.total - self.resident

    @property
    def total(self) -> int:
        """All memory."""
        return self.weights + self.basis + self.kv_cache + self.loaded + self.process + self.resident


@dataclass(frozen=True, slots=True)
class Plan:
    """The resources that serving takes."""

    model: ModelSizes
    adapter: AdapterSizes
    memory: Memory
    num_resident: int
    """Adapters that a replica can use at once."""
    num_kv_tokens: int
    ratio: Ratio
    speed: Speed
    """Speed of one replica, without adapters."""
    requests_per_s: float
    """Requests a second that one replica answers, with adapters, at full load."""
    num_needed: int
    num_replicas: int
    """All replicas, with the spare ones."""
    command: str
    """The command that starts a replica. Words in capitals are for people to fill in."""
    cluster_command: str
    """The command that starts all replicas on Ray Serve. Words in capitals are for people to fill in."""


def sizes(config: PlanConfig) -> tuple[ModelSizes, AdapterSizes]:
    """Return the sizes of the model and of an adapter. Raises `ModelError`, or `PlanError` if requests are too long."""
    dtype = getattr(torch, config.dtype)
    model = model_sizes(config.model, dtype, config.quantization)
    if config.prompt_tokens + config.completion_tokens > model.max_context:
        lengths = f"{config.prompt_tokens} and {config.completion_tokens}"
        raise PlanError(f"--prompt-tokens, --completion-tokens: {lengths}, and {model.name} has a context of {model.max_context}")
    return model, adapter_sizes(model.shapes, config.rank, config.sparsity, dtype, config.targets)


def make_plan(config: PlanConfig, model: ModelSizes, adapter: AdapterSizes, speed: Speed) -> Plan:
    """Return the plan. Raises `PlanError` if a replica's memory is too small."""
    num_kv_tokens = config.max_batch * _rounded_to_blocks(config.prompt_tokens + config.completion_tokens)
    fixed = Memory(
        weights=model.weights,
        basis=basis_bytes(model.shapes, config.rank, getattr(torch, config.dtype), config.bases),
        kv_cache=num_kv_tokens * model.kv_token,
        loaded=MAX_LOADING * adapter.resident if config.device == "cpu" else 0,  # those of a GPU are in the machine's memory
        process=int(config.process_gib * GIB),
        resident=0,
    )
    num_resident = _num_resident(config, fixed, adapter)
    memory = Memory(
        fixed.weights, fixed.basis, fixed.kv_cache, fixed.loaded, fixed.process, num_resident * _resident_bytes(adapter)
    )
    ratio = config.known_ratio
    assert ratio, "a config without one is refused"
    requests_per_s = speed.at_most(config.max_batch) * ratio.value / config.completion_tokens
    num_needed = math.ceil(config.rps / (requests_per_s * config.utilisation))
    num_replicas = num_needed + config.spare
    flags = _flags(config, memory, num_resident, adapter)
    replica_flags = "--replica-cpus CORES" + (" --replica-gpus 1" if config.device == "cuda" else "")
    return Plan(
        model, adapter, memory, num_resident, num_kv_tokens, ratio, speed, requests_per_s, num_needed, num_replicas,
        f"{SERVER} {flags}", f"{SERVER}.cluster --replicas {num_replicas} {replica_flags} {flags}",
    )  # fmt: skip


def _rounded_to_blocks(num_tokens: int) -> int:
    block = int(Settings.model_fields["block_size"].default)
    return -(-num_tokens // block) * block


def _resident_bytes(adapter: AdapterSizes) -> int:
    return math.ceil(HELD_FACTOR * adapter.resident)


def _num_resident(config: PlanConfig, fixed: Memory, adapter: AdapterSizes) -> int:
    wanted = config.max_resident or (MAX_RESIDENT if config.memory_gib else int(Settings.model_fields["max_resident"].default))
    # Each request of a batch may name adapters of its own; with fewer adapters than that, all of them.
    least = min(config.adapters, config.max_batch * config.terms)
    num = min(wanted, config.adapters)
    if config.memory_gib:
        fits = max(0, int(config.memory_gib * GIB) - fixed.total) // _resident_bytes(adapter)
        if fits < least:
            needed = gib(fixed.total + least * _resident_bytes(adapter))
            raise PlanError(
                f"--memory-gib {config.memory_gib:g} holds {fits} adapters beside all else, expected at least {least}, as many "
                f"as a batch may use: {needed:g} would do, or a smaller --max-batch"
            )
        num = min(num, fits)
    if num < least:
        raise PlanError(f"--max-resident is {num}, expected at least {least}, as many adapters as a batch may use")
    return num


def _flags(config: PlanConfig, memory: Memory, num_resident: int, adapter: AdapterSizes) -> str:
    flags = {
        "--model": config.model,
        "--adapters": "FOLDER",
        "--no-demo-adapters": config.model is None,  # they have rank 32, and are not in the plan
        "--device": config.device,
        "--dtype": config.dtype,
        "--quantization": config.quantization,
        "--max-rank": config.rank,
        "--max-batch": config.max_batch,
        "--max-resident": num_resident,
        "--resident-gib": gib(RESERVED_FACTOR * num_resident * adapter.resident),
        "--loaded-gib": gib(MAX_LOADING * adapter.resident),
        "--kv-cache-gib": gib(memory.kv_cache),
    }
    return " ".join(
        flag if value is True else f"{flag} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}"
        for flag, value in flags.items()
        if value
    )


def assumptions(config: PlanConfig, plan: Plan) -> list[str]:
    """Return the assumptions of the plan, each as a sentence."""
    source = f"measured now at {config.server}" if config.server else "as --tokens-per-s says"
    source = f"docs/benchmarks.md: {MODEL}" if config.is_measured else source
    generated = f"{plan.speed.together:g} tokens/s without adapters for {plan.speed.users} users ({source})"
    if config.max_batch < plan.speed.users:
        generated += f", so {plan.speed.at_most(config.max_batch):.3g} for the {config.max_batch} that run together"
    is_short = plan.num_kv_tokens < plan.model.max_context
    refused = f", and the server refuses a request of more than these {plan.num_kv_tokens:,} tokens" if is_short else ""
    assumed = [
        f"Requests have {config.prompt_tokens} prompt tokens and {config.completion_tokens} new ones, and name "
        f"{config.terms} of {config.adapters:,} adapters; no prompt is found in the prefix cache.",
        f"A replica generates {generated}, and {plan.ratio.value:g} times that with them ({plan.ratio.source}).",
        f"A replica is to be busy {config.utilisation:.0%} of the time, and {config.spare} may fail.",
        f"Adapters: rank {config.rank}, {100 * (1 - config.sparsity):.3g}% of B kept, on {config.bases} A, all linear layers"
        + (f" called {', '.join(config.targets)}" if config.targets else "")
        + "; masks are drawn (rows differ as those of the demo adapters do).",
        f"KV memory holds a full batch of {config.max_batch} requests at their ends{refused}; --loaded-gib the "
        f"{MAX_LOADING} adapters that may be on their way, since one that is not resident is read again.",
        f"Resident adapters hold {HELD_FACTOR:g} times their bytes: memory is laid out before it is known which modules "
        "keep more.",
        f"A process takes {config.process_gib:g} GiB beside all that is counted "
        + ("(measured with the embedded model)." if config.overhead_gib is None else "(--overhead-gib)."),
        "The compiled kernels are there: without them adapters take more memory.",
    ]
    if config.ratio is None and config.model:
        assumed.append("The ratio was measured on another model: of a larger one's step adapters are a smaller part.")
    if config.ratio is None and (precision := config.quantization or config.dtype) != MEASURED["dtype"]:
        assumed.append(f"The ratio was measured in {MEASURED['dtype']}, not in {precision}, whose steps take another time.")
    return assumed
