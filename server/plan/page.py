"""Output of the planner: tables for people, or one JSON document."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lori.cli.output import percent, print_fields, print_table, size
from server.plan.config import PlanConfig
from server.plan.memory import GIB
from server.plan.plan import Plan, assumptions
from server.plan.simulation import WARM_UP, Outcome


def print_plan(config: PlanConfig, plan: Plan) -> None:
    """Print a plan, with its assumptions."""
    _print_memory(config, plan)
    _print_adapters(config, plan)
    served = plan.requests_per_s * config.completion_tokens
    print_fields(
        [
            ("asked for", f"{config.rps:g} requests/s, {config.rps * config.completion_tokens:,.0f} new tokens/s"),
            ("of one replica", f"{plan.requests_per_s:.3g} requests/s, {served:,.0f} new tokens/s, at most"),
            ("replicas", f"{plan.num_replicas}: {plan.num_needed} at {config.utilisation:.0%} of that, {config.spare} to spare"),
            ("memory of all", f"{plan.num_replicas * plan.memory.total / GIB:,.1f} GiB"),
            ("each started as", plan.command),
            ("or all, on Ray Serve", plan.cluster_command),
        ]
    )
    print()
    print("This assumes:")
    for assumption in assumptions(config, plan):
        print(f"- {assumption}")


def _print_memory(config: PlanConfig, plan: Plan) -> None:
    memory = plan.memory
    rows = [
        (f"weights in {config.quantization or config.dtype}", memory.weights),
        (f"A of rank {config.rank}", memory.basis),
        (f"keys and values of {plan.num_kv_tokens:,} tokens, {plan.model.kv_token:,} bytes each", memory.kv_cache),
        ("adapters on their way", memory.loaded),
        ("the process", memory.process),
        (f"{plan.num_resident:,} resident adapters", memory.resident),
        ("all", memory.total),
    ]
    title = f"A replica of {plan.model.name}"
    print_table([title, "GiB"], [(label, f"{num_bytes / GIB:.2f}") for label, num_bytes in rows])


def _print_adapters(config: PlanConfig, plan: Plan) -> None:
    adapter = plan.adapter
    room = plan.memory.total - plan.memory.fixed

    def row(label: str, lori: int, dense: int) -> tuple[str, ...]:
        return label, size(lori), size(dense), f"{dense / lori:.1f}"

    print_table(
        [f"An adapter, rank {config.rank}", "LoRI", "dense LoRA", "times"],
        [
            row("in memory", adapter.resident, adapter.dense),
            row("on disk", adapter.on_disk, adapter.dense),
            row(f"all {config.adapters:,} on disk", config.adapters * adapter.on_disk, config.adapters * adapter.dense),
            ("resident in a GiB", str(GIB * plan.num_resident // room), str(GIB // adapter.dense), ""),
            (f"resident in {room / GIB:.2f} GiB", str(plan.num_resident), str(room // adapter.dense), ""),
        ],
    )


COLUMNS = [
    "replicas",
    "routed by",
    "busy",
    "hits",
    "cold loads/s",
    "p99 wait, ms",
    "p50, s",
    "p99, s",
    "busiest / mean",
    "at the first in rank",
]


def print_outcomes(config: PlanConfig, plan: Plan, load_s: float, outcomes: Sequence[Outcome]) -> None:
    """Print the simulation, with its assumptions."""
    rows = [_outcome_cells(outcome, config.rps / plan.requests_per_s) for outcome in outcomes]
    title = f"{config.requests:,} requests at {config.rps:g} a second for {config.adapters:,} adapters, zipf {config.zipf:g}"
    print()
    print_table(COLUMNS, rows, title)
    print(
        f"Simulated: {plan.num_resident:,} adapters resident in each replica, one read from disk in {1e3 * load_s:.1f} ms at "
        f"{config.disk_mb_per_s:g} MB/s; Poisson arrivals; answers' lengths geometric; the first {WARM_UP:.0%} not counted; "
        "nothing fails."
    )


def _outcome_cells(outcome: Outcome, num_busy: float) -> list[str]:
    shares = [percent(num_busy / outcome.num_replicas), percent(outcome.hit_rate)]
    seconds = [f"{1e3 * outcome.p99_wait_s:.0f}", f"{outcome.p50_s:.2f}", f"{outcome.p99_s:.2f}"]
    return [
        str(outcome.num_replicas),
        outcome.policy,
        *shares,
        f"{outcome.loads_per_s:.1f}",
        *seconds,
        f"{outcome.imbalance:.2f}",
        percent(outcome.first_share),
    ]


def as_document(config: PlanConfig, plan: Plan, load_s: float | None, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return all results for a script: bytes, seconds, and the settings that led to them."""
    document = dataclasses.asdict(plan)
    del document["model"]["shapes"]
    document["memory"]["total"] = plan.memory.total
    settings = config.model_dump(mode="json", exclude={"as_json"})
    document |= {"settings": settings, "assumptions": assumptions(config, plan)}
    if outcomes:
        document["simulation"] = {"load_s": load_s, "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]}
    return document
