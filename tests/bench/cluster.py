"""What several replicas bring and cost, beside plain servers on the same machine, all with one thread each.

`python -m tests.bench.cluster`: SmolLM2-135M in bf16 and adapters as in `tests.bench.serve`. Takes two cores, which the users
share with all processes.

- Overhead: one request at a time, to a plain server and to a cluster of one replica in turn.
- Throughput: so many users, who ask again when answered, at one plain server, at two of them with half the users each (what the
  machine can give), and at clusters of one replica and of two. They take turns; ratios are those within a turn.
- Affinity: the share of requests that reach the replica which answered most of their adapter's.
- Loss: a replica of two is killed under load; what the client library did not bring home, and when there are two again.
"""

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lori.base_identity import identify_files
from lori.cli.output import print_table
from lori.embedded import embedded_model
from tests.bench.cluster_loss import kill_one
from tests.bench.cluster_overhead import overheads
from tests.bench.cluster_targets import Cluster, start_cluster, whole_send
from tests.bench.machine import machine, versions
from tests.bench.serve_adapters import adapter_name, write_adapters
from tests.bench.serve_asks import Ask, Choice, distinct, make_asks, zipf
from tests.bench.serve_figures import Spread, number
from tests.bench.serve_load import Send, closed_loop
from tests.bench.serve_targets import Server, start_own
from tests.bench.serve_wire import FailedError

NUM_ADAPTERS = 64
PROMPT_WORDS, NUM_TOKENS = 100, 64
POPULARITIES: Mapping[str, Callable[[Sequence[str], str], Choice]] = {
    "all alike": lambda names, _: distinct(names),
    "zipf": zipf,
}
SENDS: Mapping[str, Callable[[Server], Send]] = {"streams": lambda server: server.send, "whole answers": whole_send}
PLAIN, TWO_PLAIN, ONE, TWO = "one plain server", "two plain servers", "one replica", "two replicas"
LIMIT = (TWO_PLAIN, PLAIN)
RATIOS = (LIMIT, (TWO, ONE), (ONE, PLAIN), (TWO, TWO_PLAIN))


def main() -> None:
    """Prints what was found."""
    arguments = parse()
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    flags = ["--kv-cache-gib", "0.5", *arguments.server_flags.split()]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        place = Path(scratch)
        adapters = write_adapters(place / "adapters", identify_files(str(embedded_model())), NUM_ADAPTERS)
        try:
            plain, clusters = [], []
            for i in range(2):
                plain.append(start_own(None, adapters, cores, place / f"plain-{i}.log", flags))
                stack.callback(plain[-1].program.end)
            for num_replicas in (1, 2):
                clusters.append(start_cluster(adapters, num_replicas, cores, place / f"cluster-{num_replicas}.log", flags))
                stack.callback(clusters[-1].end)
            found = measure(plain, clusters, arguments)
        except FailedError as error:
            raise SystemExit(f"error: {error}") from error
    report(found)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "versions": versions()} | found, indent=2))


def parse() -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each; 3 if absent")
    parser.add_argument("--users", type=int, default=32, help="users of the throughput; 32 if absent")
    parser.add_argument("--requests", type=int, default=64, help="requests of each load; 64 if absent")
    parser.add_argument("--kills", type=int, default=3, help="replicas that are killed; 3 if absent")
    parser.add_argument("--server-flags", default="", help="more flags of all servers, in one string")
    return parser.parse_args()


def measure(plain: Sequence[Server], clusters: Sequence[Cluster], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures all of it. Raises `FailedError`."""
    one, two = clusters
    names = [adapter_name(i) for i in range(NUM_ADAPTERS)]
    loads = [(send, popularity) for send in SENDS for popularity in POPULARITIES]
    found: dict[str, Any] = {"overhead": [], "throughput": [], "loss": []}
    with tqdm(total=arguments.repeats * (1 + len(loads)) + arguments.kills, unit="part", disable=None) as bar:
        for turn in range(arguments.repeats):
            found["overhead"].append(overheads(plain[0].port, one.server.port, names, f"overhead {turn}"))
            bar.update()
            for send, popularity in loads:
                choose = POPULARITIES[popularity](names, f"{turn}")
                asks = make_asks(f"{send} {popularity} {turn}", arguments.requests, PROMPT_WORDS, NUM_TOKENS, choose)
                sends = [SENDS[send](server) for server in (*plain, one.server, two.server)]
                before = two.by_adapter()
                speeds = {
                    PLAIN: speed(sends[:1], asks, arguments.users),
                    ONE: speed(sends[2:3], asks, arguments.users),
                    TWO_PLAIN: speed(sends[:2], asks, arguments.users),
                    TWO: speed(sends[3:], asks, arguments.users),
                }
                share = affinity(before, two.by_adapter())
                found["throughput"].append({"load": f"{send}, {popularity}", "speeds": speeds, "affinity": share})
                bar.update()
        for _ in range(arguments.kills):
            found["loss"].append(kill_one(two, names))
            bar.update()
    return found


def speed(sends: Sequence[Send], asks: Sequence[Ask], num_users: int) -> float:
    """Returns the tokens/s of servers that have as many of the users, and requests, each. Raises `FailedError`."""

    async def run() -> float:
        parts = [closed_loop(send, asks[i :: len(sends)], num_users // len(sends)) for i, send in enumerate(sends)]
        loads = await asyncio.gather(*parts)
        return sum(len(load.replies) for load in loads) * NUM_TOKENS / max(load.seconds for load in loads)

    return asyncio.run(run())


def affinity(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> float:
    """Returns the share of an adapter's requests at the replica that answered most of them, over all adapters."""
    numbers = [
        [number - before.get(adapter, {}).get(replica, 0) for replica, number in replicas.items()]
        for adapter, replicas in after.items()
    ]
    return sum(map(max, numbers)) / sum(map(sum, numbers))


def report(found: Mapping[str, Any]) -> None:
    """Prints tables of medians and ranges."""
    where = machine()
    print(f"{where['cpu']}, {where['cores']} cores; " + ", ".join(f"{name} {said}" for name, said in versions().items()))
    overhead = {what: Spread.of(turn[what]["more_ms"] for turn in found["overhead"]) for what in found["overhead"][0]}
    plain = {what: Spread.of(turn[what]["plain_ms"] for turn in found["overhead"]) for what in overhead}
    print_table(["one request", "plain, ms", "more, ms"], [[what, str(plain[what]), str(overhead[what])] for what in overhead])
    rows = []
    for load in dict.fromkeys(turn["load"] for turn in found["throughput"]):
        turns = [turn for turn in found["throughput"] if turn["load"] == load]
        speeds = [number(Spread.of(turn["speeds"][name] for turn in turns).median) for name in (PLAIN, TWO_PLAIN, ONE, TWO)]
        ratios = [str(Spread.of(turn["speeds"][a] / turn["speeds"][b] for turn in turns)) for a, b in RATIOS]
        rows.append([load, *speeds, *ratios, str(Spread.of(100 * turn["affinity"] for turn in turns))])
    columns = ["tokens/s", PLAIN, TWO_PLAIN, ONE, TWO, *(f"{a} / {b}" for a, b in RATIOS), "affinity, %"]
    for of_row in zip(columns, *rows, strict=True):
        print(f"{of_row[0]:40}", *(f"{cell:>24}" for cell in of_row[1:]))
    for loss in found["loss"]:
        said = "{lost} of {asked} lost, {begun} streams broken, another replica after {seconds:.1f} s"
        print("a replica killed:", said.format(**loss))


if __name__ == "__main__":
    main()
