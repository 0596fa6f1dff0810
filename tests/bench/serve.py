"""Throughput and latency of this server with and without adapters, and of other engines on the same machine.

`python -m tests.bench.serve`: SmolLM2-135M in bf16, adapters of r = 32 on all seven projections with a tenth of B nonzero,
requests of about 100 prompt tokens and 64 new tokens. Each engine has one thread on one core, or `--threads`; the users run on
the last core, which is one of the engines' if there is no other. Users are clients over sockets in a closed loop: each sends
its next request when the last one is answered. In the open loop requests arrive at random, at 0.8 of the closed loop's rate. No
prompt is repeated.

Each of the `--repeats` rounds measures every case. Figures are medians and ranges over the rounds; ratios are computed within a
round. "first token" and "gap" (the time between two pieces of text) are percentiles over all requests of a case. Other engines
are measured if they are installed: `tests/bench/peers.sh DIR`, then `--peers DIR`. The engine's tests must pass first; they run
once for the same code.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from lori.cli.output import print_table
from lori.embedded import embedded_model
from lori.native import ISAS, MAX_ISA_VARIABLE
from tests.bench.gate import check_tests
from tests.bench.machine import machine, pinned, versions
from tests.bench.serve_cases import CONCURRENCY, NUM_DISTINCT, PROBES, Trial, own_cases, peer_cases, trials
from tests.bench.serve_figures import Spread
from tests.bench.serve_goals import goals
from tests.bench.serve_probes import Sizes
from tests.bench.serve_results import COLUMNS, Results, cells
from tests.bench.serve_run import Plan
from tests.bench.serve_stage import Setting, missing_peers, staged
from tests.bench.serve_wire import FailedError

TESTS = Path(__file__).parents[1] / "server" / "engine"
GATE = [
    str(TESTS / f"{name}.py")
    for name in (
        "test_engine",
        "model/test_runner",
        "scheduling/test_scheduler",
        "scheduling/test_scheduler_adapters",
        "scheduling/test_scheduler_choices",
        "scheduling/test_fair_shares",
        "scheduling/test_kv_cache",
        "sampling/test_sampler",
    )
]
"""Test files that must pass before anything is printed; for a quick run, the first two."""
QUIET_PERCENT = 5.0
"""Maximum percentage of the servers' cores that other processes may use. More than that changes the figures."""
QUICK = ("off", "unused", str(NUM_DISTINCT), "merge2", "cold")


def main() -> None:
    """Run the benchmark and print a table and the design's goals."""
    arguments = parse()
    check_tests(GATE[:2] if arguments.quick else GATE)
    if arguments.scratch:
        arguments.scratch.mkdir(parents=True, exist_ok=True)
    plan, cores = planned(arguments), sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch, pinned(cores[-1]):
        setting = Setting(
            cores=cores[: arguments.threads],
            scratch=Path(scratch),
            model=arguments.model,
            peers=arguments.peers,
            flags=arguments.server_flags.split(),
            num_registered=arguments.registered if "zipf" in arguments.cases else NUM_DISTINCT,
            num_cold=2 * plan.sizes.num_pairs * arguments.repeats if "cold" in plan.probes else 0,
        )
        try:
            results = measure(plan, setting, arguments.repeats)
        except FailedError as error:
            sys.exit(f"error: {error}")
    report(results, num_weight_bytes(arguments.model), arguments.threads, arguments.json, arguments.plot)


def parse() -> argparse.Namespace:
    """Return the command-line arguments, with defaults that depend on other arguments filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [*own_cases(1), *peer_cases()]
    slugs = [*dict.fromkeys(case.group for case in cases), *PROBES]
    names = dict.fromkeys([*slugs, *(case.slug for case in cases)])
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--quick", action="store_true", help=f"two repeats of {', '.join(QUICK)}: within three minutes")
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}; all if absent")
    parser.add_argument("--repeats", type=int, help="rounds of all cases; 5 if absent")
    parser.add_argument("--registered", type=int, default=10_000, help="adapters of the case zipf")
    parser.add_argument("--peers", type=Path, help="the folder that peers.sh filled")
    parser.add_argument("--model", type=Path, help="another base model's folder")
    parser.add_argument("--threads", type=int, default=1, help="threads of each engine, on as many cores")
    parser.add_argument("--isa", choices=ISAS, help="limit this server and torch to an instruction set")
    parser.add_argument("--server-flags", default="", help="more flags of this server, in one string")
    parser.add_argument(
        "--scratch", type=Path, help="where adapters are written, and removed: 45 MB and 8 kB an adapter; made if absent"
    )
    arguments = parser.parse_args()
    if arguments.isa:
        os.environ[MAX_ISA_VARIABLE] = arguments.isa
    if not 1 <= arguments.threads <= len(os.sched_getaffinity(0)):
        parser.error(f"--threads is {arguments.threads}, expected 1 to {len(os.sched_getaffinity(0))}, the CPUs that there are")
    arguments.cases = arguments.cases or (QUICK if arguments.quick else slugs)
    arguments.repeats = arguments.repeats or (2 if arguments.quick else 5)
    return arguments


def planned(arguments: argparse.Namespace) -> Plan:
    """Return the plan of the run. Prints which other engines are left out."""
    missing = missing_peers(arguments.peers, arguments.model is not None)
    cases = [case for case in [*own_cases(arguments.registered), *peer_cases()] if {case.group, case.slug} & {*arguments.cases}]
    for engine in dict.fromkeys(case.engine for case in cases if case.engine in missing):
        print(f"{engine} is left out: {missing[engine]}", file=sys.stderr)
    present = [case for case in cases if case.engine not in missing]
    probes = [probe for probe in PROBES if probe in arguments.cases]
    if "open" in probes and str(NUM_DISTINCT) not in arguments.cases:
        sys.exit(f"error: the case open is at a share of what {NUM_DISTINCT} adapters reach: add the case {NUM_DISTINCT}")
    chosen = trials(present, [NUM_DISTINCT] if arguments.quick else CONCURRENCY)
    if arguments.quick:
        chosen += [Trial(case, 1) for case in present if case.slug == "off"]
    return Plan(chosen, probes, Sizes(), num_warm=2000)


def measure(plan: Plan, setting: Setting, repeats: int) -> Results:
    """Write the adapters, start the engines, and measure. Raises `FailedError`."""
    with staged(setting) as stage, progress(plan.size * repeats) as bar:

        def tick(part: str) -> None:
            bar.set_postfix_str(part)
            bar.update()

        return plan.run(stage, repeats, tick)


@contextmanager
def progress(size: int) -> Iterator[Any]:
    """Context manager of a progress bar."""
    with tqdm(total=size, unit="part", disable=None) as bar:
        yield bar


def num_weight_bytes(model: Path | None) -> int:
    """Return the bytes of the model in bf16 that a step must read: every parameter once."""
    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model or embedded_model()))
    return 2 * sum(parameter.numel() for parameter in loaded.parameters())


def report(results: Results, weight_bytes: int, num_threads: int, json_file: Path | None, plot_file: Path | None) -> None:
    """Print all results, and write the files that were asked for."""
    host, software, rows = machine(), versions(), results.rows()
    bandwidth = Spread.of(bandwidth / 1e9 for bandwidth in results.bandwidths)
    print(f"{host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB; {num_threads} read {bandwidth} GB/s from memory")
    print(", ".join(f"{name} {version}" for name, version in software.items()))
    print(f"threads of each engine: {num_threads}; users on the last core; {len(results.bandwidths)} repeats; medians (ranges)")
    print(f"of the servers' cores others used {describe_disturbances(results.disturbances)}")
    print_table(COLUMNS, [cells(row) for row in rows])
    for name, values in results.figures.items():
        print(f"{name}: {Spread.of(values)}")
    judged = list(goals(results, weight_bytes))
    print("\nWhat this server was designed for. A goal that is missed is no error.")
    for goal in judged:
        print(goal)
    if json_file:
        document = {
            "machine": host | {"bandwidth_gb_per_s": bandwidth.median, "weight_bytes": weight_bytes, "threads": num_threads},
            "versions": software,
            "disturbances": results.disturbances,
            "rows": [asdict(row) for row in rows],
            "figures": {name: asdict(Spread.of(values)) for name, values in results.figures.items()},
            "goals": [asdict(goal) | {"is_met": goal.is_met} for goal in judged],
        }
        json_file.write_text(json.dumps(document, indent=2))
    if plot_file:
        # matplotlib is an optional dependency, which the table does not need.
        importlib.import_module("tests.bench.serve_plot").plot([asdict(row) for row in rows], plot_file)


def describe_disturbances(disturbances: Sequence[float]) -> str:
    """Return how much of the servers' cores other processes used, with a warning if it was too much."""
    spread = Spread.of(100 * share for share in disturbances or [0.0])
    return f"{spread} %; far above 1 % the figures say little" if spread.high > QUIET_PERCENT else f"{spread} %"


if __name__ == "__main__":
    main()
