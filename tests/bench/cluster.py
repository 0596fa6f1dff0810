"""Benefit and cost of several replicas, compared with plain servers on the same machine; each has one thread.

`python -m tests.bench.cluster`: SmolLM2-135M in bf16 and adapters as in `tests.bench.serve`. Uses two cores, which the users
share with all processes.

- Overhead: one request at a time, alternately to a plain server and to a cluster of one replica.
- Throughput: users in a closed loop, at one plain server, at two plain servers with half of the users each (the limit of the
  machine), and at clusters of one replica and of two. Each round measures every target, and only one target runs at a time.
  Ratios are computed within a round.
- Affinity: the share of requests that reach the replica which answered most requests of their adapter.
- Loss: one of two replicas is killed under load. Counts the requests that the client library lost, and measures the time until
  there are two replicas again.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lori.base_identity import identify_files
from lori.cli.output import print_table
from lori.embedded import embedded_model
from tests.bench.cluster_loss import kill_one
from tests.bench.cluster_overhead import overheads
from tests.bench.cluster_targets import Cluster, start_cluster, whole_send
from tests.bench.cluster_throughput import Window, throughput
from tests.bench.machine import machine, versions
from tests.bench.serve_adapters import adapter_name, write_adapters
from tests.bench.serve_asks import Choice, distinct, zipf
from tests.bench.serve_figures import Spread, number
from tests.bench.serve_load import Send
from tests.bench.serve_targets import Server, start_own
from tests.bench.serve_wire import FailedError

NUM_ADAPTERS = 64
NAMES = [adapter_name(i) for i in range(NUM_ADAPTERS)]
POPULARITIES: Mapping[str, Callable[[Sequence[str], str], Choice]] = {
    "all alike": lambda names, _: distinct(names),
    "zipf": zipf,
}
SENDS: Mapping[str, Callable[[Server], Send]] = {"streams": lambda server: server.send, "whole answers": whole_send}
PLAIN, TWO_PLAIN, ONE, TWO = "one plain server", "two plain servers", "one replica", "two replicas"
LIMIT = (TWO_PLAIN, PLAIN)
RATIOS = (LIMIT, (TWO, ONE), (ONE, PLAIN), (TWO, TWO_PLAIN))


def main() -> None:
    """Run the benchmark and print the results."""
    arguments = parse()
    cores = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as scratch:
        adapters = write_adapters(Path(scratch) / "adapters", identify_files(str(embedded_model())), NUM_ADAPTERS)
        stage = Stage(
            adapters,
            cores,
            Path(scratch),
            ["--kv-cache-gib", "0.5", *arguments.server_flags.split()],
            arguments.cluster_flags.split(),
        )
        results: dict[str, Any] = {"machine": machine(), "versions": versions(), "overhead": [], "throughput": [], "loss": []}

        def keep() -> None:
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=2))

        try:
            measure(stage, arguments, results, keep)
        except FailedError as error:
            raise SystemExit(f"error: {error}") from error
    report(results)


def parse() -> argparse.Namespace:
    """Return the command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write all figures, anew after each part")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each part; 3 if absent")
    parser.add_argument("--users", type=int, default=64, help="users of the throughput; 64 if absent")
    parser.add_argument("--warm-s", type=float, default=8, help="seconds of each load that do not count; 8 if absent")
    parser.add_argument("--seconds", type=float, default=16, help="seconds of each load that count; 16 if absent")
    parser.add_argument("--kills", type=int, default=3, help="replicas that are killed; 3 if absent")
    parser.add_argument("--server-flags", default="", help="more flags of all servers, in one string")
    parser.add_argument("--cluster-flags", default="", help="more flags of the clusters alone, in one string")
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Stage:
    """Starter of the servers and clusters to measure."""

    adapters: Path
    cores: Sequence[int]
    scratch: Path
    flags: Sequence[str]
    cluster_flags: Sequence[str]

    @contextmanager
    def plain(self, count: int) -> Iterator[Sequence[Server]]:
        """Context manager of `count` running plain servers."""
        with ExitStack() as stack:
            servers: list[Server] = []
            for i in range(count):
                log = self.scratch / f"plain-{i}.log"
                servers.append(start_own(None, self.adapters, self.cores, log, self.flags, num_threads=1))
                stack.callback(servers[-1].program.end)
            yield servers

    @contextmanager
    def cluster(self, num_replicas: int) -> Iterator[Cluster]:
        """Context manager of a running cluster."""
        flags = [*self.flags, *self.cluster_flags]
        cluster = start_cluster(self.adapters, num_replicas, self.cores, self.scratch / "cluster.log", flags)
        try:
            yield cluster
        finally:
            cluster.end()


def measure(stage: Stage, arguments: argparse.Namespace, results: Mapping[str, list[Any]], keep: Callable[[], None]) -> None:
    """Measure everything. Adds each part to `results` and then calls `keep`. Raises `FailedError`."""
    window = Window(arguments.warm_s, arguments.seconds)
    num_loads = 4 * len(SENDS) * len(POPULARITIES)
    with tqdm(total=arguments.repeats * (1 + num_loads) + arguments.kills, unit="part", disable=None) as bar:

        def done() -> None:
            bar.update()
            keep()

        def loads(figures: dict[str, Any], servers: Sequence[Server], round_number: int, cluster: Cluster | None = None) -> None:
            for send in SENDS:
                for popularity, choice in POPULARITIES.items():
                    before = cluster.by_adapter() if cluster else {}
                    choose = choice(NAMES, f"{round_number}")
                    seed = f"{send} {popularity} {round_number}"
                    speed = throughput([SENDS[send](server) for server in servers], arguments.users, choose, seed, window)
                    share = {"affinity": affinity(before, cluster.by_adapter())} if cluster else {}
                    figures[f"{send}, {popularity}"] = asdict(speed) | share
                    done()

        with stage.plain(1) as plain, stage.cluster(1) as cluster:
            for round_number in range(arguments.repeats):
                results["overhead"].append(overheads(plain[0].port, cluster.server.port, NAMES, f"overhead {round_number}"))
                done()
        for round_number in range(arguments.repeats):
            round_results: dict[str, Any] = {name: {} for name in (PLAIN, TWO_PLAIN, ONE, TWO)}
            results["throughput"].append(round_results)
            for name, count in ((PLAIN, 1), (TWO_PLAIN, 2)):
                with stage.plain(count) as servers:
                    loads(round_results[name], servers, round_number)
            for name, count in ((ONE, 1), (TWO, 2)):
                with stage.cluster(count) as cluster:
                    loads(round_results[name], [cluster.server], round_number, cluster)
        if arguments.kills:
            with stage.cluster(2) as cluster:
                for _ in range(arguments.kills):
                    results["loss"].append(kill_one(cluster, NAMES))
                    done()


def affinity(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> float:
    """Return the share of requests that reached the replica which answered most requests of their adapter."""
    numbers = [
        [number - before.get(adapter, {}).get(replica, 0) for replica, number in replicas.items()]
        for adapter, replicas in after.items()
    ]
    return sum(map(max, numbers)) / sum(map(sum, numbers))


def report(results: Mapping[str, Any]) -> None:
    """Print tables of medians and ranges."""
    host = machine()
    print(f"{host['cpu']}, {host['cores']} cores; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    overhead = {kind: Spread.of(row[kind]["more_ms"] for row in results["overhead"]) for kind in results["overhead"][0]}
    plain = {kind: Spread.of(row[kind]["plain_ms"] for row in results["overhead"]) for kind in overhead}
    print_table(["one request", "plain, ms", "more, ms"], [[kind, str(plain[kind]), str(overhead[kind])] for kind in overhead])
    rounds, rows = results["throughput"], []
    for load in rounds[0][TWO]:
        speeds = [{name: loads[load]["tokens_per_s"] for name, loads in targets.items()} for targets in rounds]
        medians = [number(Spread.of(speed[name] for speed in speeds).median) for name in (PLAIN, TWO_PLAIN, ONE, TWO)]
        ratios = [str(Spread.of(speed[a] / speed[b] for speed in speeds)) for a, b in RATIOS]
        cores = [
            number(Spread.of(targets[name][load]["cores"] for targets in rounds).median) for name in (PLAIN, TWO_PLAIN, ONE, TWO)
        ]
        rows.append(
            [load, *medians, *ratios, " ".join(cores), str(Spread.of(100 * targets[TWO][load]["affinity"] for targets in rounds))]
        )
    columns = ["tokens/s", PLAIN, TWO_PLAIN, ONE, TWO, *(f"{a} / {b}" for a, b in RATIOS), "cores busy, of each", "affinity, %"]
    for cells in zip(columns, *rows, strict=True):
        print(f"{cells[0]:40}", *(f"{cell:>24}" for cell in cells[1:]))
    for loss in results["loss"]:
        summary = "{lost} of {asked} lost, {begun} streams broken, another replica after {seconds:.1f} s"
        print("a replica killed:", summary.format(**loss))


if __name__ == "__main__":
    main()
