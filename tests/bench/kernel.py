"""Cost of the deltas, compared with the base product and with the time to read the adapters' bytes.

`python -m tests.bench.kernel`: bf16, r = 32, 10% of B nonzero, one request for each token. "base" is W x. "shrink" is the
additional time of A's rows below W. "expand" is `add_delta` as the layers call it. "dense" is a batched product with a dense B
for each token; gathering B is not counted. "floor" is the time to read the adapters' bytes at the machine's bandwidth. "hot"
steps run on one module again and again; "cold" steps cycle through more copies of the module than the caches hold, as the layers
of a model do. Prints nothing until the kernels' tests pass.
"""

import argparse
import functools
import importlib
import json
import platform
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm

from lori.cli.output import print_table
from lori.native import description
from tests.bench.gate import check_tests
from tests.bench.kernel_steps import POPULARITY, SHAPES, SPARE, Module, Shape, Step
from tests.bench.timing import Call, read_bandwidth, timed

TESTS = Path(__file__).parents[1] / "lori" / "kernels"
GATE = {
    "cpu": [str(TESTS / "test_kernels.py"), str(TESTS / "test_cpu_kernel.py"), "-k", "not sanitizers"],
    "cuda": [str(TESTS / "test_gpu_kernel.py"), "-m", "gpu"],
}
"""pytest arguments of the tests that must pass before anything is printed."""
NOISY = 0.5
"""Maximum distance of the quartiles, as a fraction of the median. Measurements with a larger one are too noisy for a verdict."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of medians in us. `expand_low_us` and `expand_high_us` are quartiles. `dense_us` is None if B's would not fit."""

    model: str
    shape: str
    tokens: int
    popularity: str
    terms: int
    threads: int
    cache: str
    base_us: float
    shrink_us: float
    expand_us: float
    expand_low_us: float
    expand_high_us: float
    dense_us: float | None
    floor_us: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The measurements: all combinations of these values."""

    shapes: list[Shape]
    tokens: list[int]
    popularity: list[str]
    terms: list[int]
    caches: list[str]
    threads: list[int]
    budget_s: float

    @property
    def size(self) -> int:
        """Number of rows."""
        axes = (self.shapes, self.tokens, self.popularity, self.terms, self.caches, self.threads)
        return prod(len(axis) for axis in axes)

    def measure(self, device: torch.device) -> Iterator[Row]:
        """Yield the rows. Those of one shape, number of tokens and threads are interleaved with one base product."""
        for threads, (cache, shape, tokens) in product(self.threads, product(self.caches, self.shapes, self.tokens)):
            torch.set_num_threads(threads)
            bandwidth = _bandwidth(device, threads)
            spare = SPARE if tokens <= 128 else 1
            module = Module(shape, max(tokens, *self.terms), spare, cache == "cold", device)
            steps = {key: Step.of(module, key[0], tokens, key[1]) for key in product(self.popularity, self.terms)}
            calls: dict[Hashable, Call] = dict(module.products(tokens))
            calls |= {(key, name): call for key, step in steps.items() for name, call in step.calls().items()}
            times = timed(calls, self.budget_s)
            base, shrink = times["base"].median, times["fused"].median - times["base"].median
            for key, step in steps.items():
                expand, dense = times[key, "expand"], times.get((key, "dense"))
                yield Row(
                    shape.model, shape.name, tokens, *key, threads, cache, base, shrink, expand.median, expand.low, expand.high,
                    dense and dense.median, step.num_bytes / bandwidth * 1e6, step.num_bytes,
                )  # fmt: skip


def main() -> None:
    """Run the benchmark and print a table and the design's goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--quick", action="store_true", help="two shapes, two numbers of tokens: within a minute")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_tests(GATE[device.type])
    plan = quick(device) if arguments.quick else full(device)
    rows = list(tqdm(plan.measure(device), total=plan.size, unit="row", disable=None))
    device_name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()}, {description()}"
    )
    print(f"{device_name}; torch {torch.__version__}, Python {platform.python_version()}")
    print_table(COLUMNS, [cells(row) for row in rows])
    print("\nWhat this kernel was designed for. A goal that is missed is no error.")
    for line in verdicts(rows):
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    if arguments.plot:
        # matplotlib is an optional dependency, which the table does not need.
        importlib.import_module("tests.bench.kernel_plot").plot([asdict(row) for row in rows], arguments.plot)


@functools.cache
def _bandwidth(device: torch.device, threads: int) -> float:
    bandwidth = read_bandwidth(device)
    tqdm.write(f"{threads} thread{'s' * (threads > 1)} read {bandwidth / 1e9:.1f} GB/s from memory")
    return bandwidth


def full(device: torch.device) -> Plan:
    """Return the plan of a full run."""
    return Plan(SHAPES, [1, 8, 32, 64, 128, 1024], list(POPULARITY), [1, 2, 4], ["hot", "cold"], num_threads(device), 1.0)


def quick(device: torch.device) -> Plan:
    """Return the plan of a quick run: the cases of the design's goals, and little more."""
    shapes = [shape for shape in SHAPES if shape.name in ("576x576", "4096x4096")]
    return Plan(shapes, [32, 64], ["identical", "distinct"], [1, 2], ["hot", "cold"], num_threads(device), 0.6)


def num_threads(device: torch.device) -> list[int]:
    """Return the numbers of threads to measure: one and all; on a GPU one only."""
    return [1] if device.type == "cuda" else sorted({1, torch.get_num_threads()})


COLUMNS = [
    "shape", "tokens", "popularity", "terms", "threads", "cache", "base, us", "shrink", "expand (quartiles)", "of base", "dense",
    "dense / expand", "floor", "expand / floor",
]  # fmt: skip


def cells(row: Row) -> list[str]:
    """Return a row as text."""
    return [
        row.shape, str(row.tokens), row.popularity, str(row.terms), str(row.threads), row.cache, f"{row.base_us:.1f}",
        f"{row.shrink_us:.1f}", f"{row.expand_us:.1f} ({row.expand_low_us:.1f}–{row.expand_high_us:.1f})",
        f"{100 * row.expand_us / row.base_us:.1f}%", "–" if row.dense_us is None else f"{row.dense_us:.1f}",
        "–" if row.dense_us is None else f"{row.dense_us / row.expand_us:.1f}", f"{row.floor_us:.1f}",
        f"{row.expand_us / row.floor_us:.2f}",
    ]  # fmt: skip


def verdicts(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each of the design's goals whose rows were measured."""
    rows_by_key = {(r.shape, r.tokens, r.popularity, r.terms, r.threads, r.cache): r for r in rows}
    for threads, cache in sorted({(r.threads, r.cache) for r in rows}):
        setting = f"{cache}, {threads} thread{'s' * (threads > 1)}"
        for shape, most in (("576x576", 0.08), ("4096x4096", 0.02)):
            single = rows_by_key.get((shape, 32, "distinct", 1, threads, cache))
            double = rows_by_key.get((shape, 32, "distinct", 2, threads, cache))
            identical = rows_by_key.get((shape, 32, "identical", 1, threads, cache))
            if single:
                yield verdict(
                    f"{shape}, 32 tokens on 32 adapters, {setting}: expand / base",
                    single.expand_us / single.base_us,
                    most,
                    [single],
                )
            if single and double:
                yield verdict(f"{shape}, {setting}: two terms / one", double.expand_us / single.expand_us, 2.2, [single, double])
            if single and identical:
                yield verdict(
                    f"{shape}, {setting}: distinct / identical", single.expand_us / identical.expand_us, 1.25, [single, identical]
                )
            if single and single.dense_us and cache == "cold":
                yield verdict(f"{shape}, {setting}: expand / dense", single.expand_us / single.dense_us, 1 / 6, [single])
        for row in rows:
            if cache == "cold" and (row.model, row.tokens, row.popularity, row.terms, row.threads, row.cache) == (
                "Llama-3-8B", 64, "distinct", 1, threads, cache,
            ):  # fmt: skip
                yield verdict(
                    f"{row.shape}, 64 tokens on 64 adapters, {setting}: expand / floor", row.expand_us / row.floor_us, 2.0, [row]
                )


def verdict(title: str, ratio: float, most: float, rows: Iterable[Row]) -> str:
    """Return a line with a ratio and whether it is at most `most`, or "noisy" if the rows are too noisy for a verdict."""
    is_noisy = any(row.expand_high_us - row.expand_low_us > NOISY * row.expand_us for row in rows)
    result = "noisy" if is_noisy else "met" if ratio <= most else "missed"
    return f"{result:8}{title} {ratio:.4f}, at most {most:.4f}"


if __name__ == "__main__":
    main()
