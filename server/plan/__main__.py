"""`python -m server.plan`: plans the resources for serving very many adapters, and with --simulate simulates the requests."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from lori.cli.output import print_json
from lori.errors import LoriError
from server.client import ClientError
from server.plan.config import PlanConfig
from server.plan.memory import ModelSizes
from server.plan.page import as_document, print_outcomes, print_plan
from server.plan.plan import Plan, PlanError, make_plan, sizes
from server.plan.replica import ReplicaSizes
from server.plan.simulation import POLICIES, Outcome, draw_traffic, simulate
from server.plan.speed import LOAD_S_PER_BYTE, SINGLE_TOKENS_PER_S, TOKENS_PER_S, Speed, measure

MAX_REPLICAS = 1024
"""Maximum number of replicas in a simulation: each request looks at all of them."""
Draw = Callable[[Sequence[Outcome], Path], None]


def run(config: PlanConfig) -> None:
    """Plan, simulate if requested, and print. Raises `LoriError` or `OSError`."""
    draw = _drawer() if config.plot else None
    model, adapter = sizes(config)
    plan = make_plan(config, model, adapter, _speed(config, model))
    load_s = adapter.on_disk * (LOAD_S_PER_BYTE + 1e-6 / config.disk_mb_per_s) if config.disk_mb_per_s else None
    if not config.as_json:
        print_plan(config, plan)
    outcomes = [] if load_s is None else _outcomes(config, plan, load_s)
    if draw and config.plot:
        draw(outcomes, config.plot)
    if config.as_json:
        print_json(as_document(config, plan, load_s, outcomes))
    elif load_s is not None:
        print_outcomes(config, plan, load_s, outcomes)


def _drawer() -> Draw:
    """Return the function that draws. Raises `LoriError` if matplotlib is not installed, before the simulation."""
    try:
        from lori.compare.plots import save_figure  # noqa: PLC0415  # an extra
        from server.plan.plots import plot_outcomes  # noqa: PLC0415
    except ImportError as error:
        raise LoriError(f"--plot needs: pip install '.[plot]' ({error})") from error
    return lambda outcomes, path: save_figure(plot_outcomes(outcomes), path)


def _speed(config: PlanConfig, model: ModelSizes) -> Speed:
    if config.is_measured:
        return Speed(SINGLE_TOKENS_PER_S, TOKENS_PER_S, config.users)
    if config.tokens_per_s:
        return Speed(config.single_tokens_per_s, config.tokens_per_s, config.users)
    assert config.server, "the config has one of them"
    try:
        return measure(
            config.server,
            users=config.users,
            prompt_tokens=config.prompt_tokens,
            completion_tokens=config.completion_tokens,
            num_ids=model.num_ids,
        )
    except ClientError as error:
        raise PlanError(f"--server {config.server}: {error}") from error


def _outcomes(config: PlanConfig, plan: Plan, load_s: float) -> list[Outcome]:
    replicas = config.replicas or [plan.num_needed]
    least = config.rps / plan.requests_per_s
    if min(replicas) <= least:
        raise PlanError(f"--replicas {min(replicas)} cannot answer {config.rps:g} requests/s: expected more than {least:.2f}")
    if max(replicas) > MAX_REPLICAS:
        raise PlanError(f"--replicas: {max(replicas)} are too many to simulate: expected {MAX_REPLICAS} at most")
    slots = max(plan.num_resident, config.max_batch)  # with fewer adapters than that, nothing is ever evicted
    replica_sizes = ReplicaSizes(plan.speed.times(plan.ratio.value), config.max_batch, slots, load_s)
    traffic = draw_traffic(
        num_adapters=config.adapters,
        num_requests=config.requests,
        rps=config.rps,
        zipf=config.zipf,
        mean_tokens=config.completion_tokens,
        seed=config.seed,
    )
    total = len(replicas) * len(POLICIES) * config.requests
    with tqdm(total=total, desc="simulated", unit="request", unit_scale=True, disable=None, leave=False) as bar:
        return [
            simulate(traffic, policy, number, replica_sizes, config.seed, bar.update)
            for number in replicas
            for policy in POLICIES
        ]


def main() -> int:
    """Run the program and return its exit code: 0, 1 if there is no such plan, 2 for wrong flags."""
    config = PlanConfig.from_arguments()
    try:
        run(config)
    except (LoriError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
