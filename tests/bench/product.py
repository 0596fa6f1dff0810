"""Speed of the products in C++ alone: bfloat16, one thread, for each instruction set that this CPU runs, and torch's beside them.

    python -m tests.bench.product [--json FILE]

"hot" multiplies one layer's weights again and again, so that they stay in the second cache; "cold" reads those of many layers
from memory, in turn: 256 MiB for each set, which a large third cache may hold. GFLOP/s are those of the median round, quartiles
in parentheses; each round runs every set. On a machine that is shared with others the quartiles may lie far apart: AMX's tiles
take twice as long while another program runs on the same core.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from lori.cli.output import print_table
from lori.native import description, instruction_sets
from lori.projection import NativeProjection
from tests.bench.timing import Times, read_bandwidth, timed

SHAPE = (1536, 576)
"""Outputs and inputs of a layer: SmolLM2-135M's largest."""
TOKENS = (1, 8, 16, 32, 64, 128, 256)
COLD_BYTES = 2**28
TORCH = "torch"

Product = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """The speed of one set's products in GFLOP/s: median, first and third quartile."""

    name: str
    cache: str
    num_tokens: int
    median: float
    low: float
    high: float

    @staticmethod
    def of_times(name: str, cache: str, num_tokens: int, shape: tuple[int, int], times: Times) -> "Row":
        """Return the row of a product with weights of `shape` that takes `times` in us."""
        operations = 2 * num_tokens * shape[0] * shape[1]
        speeds = (operations / us / 1e3 for us in (times.median, times.high, times.low))
        return Row(name, cache, num_tokens, *speeds)


def measure(budget_s: float, shape: tuple[int, int] = SHAPE, cold_bytes: int = COLD_BYTES) -> Iterator[Row]:
    """Yield the rows: hot and cold, for each number of tokens and each set."""
    num_outputs, num_inputs = shape
    for cache, count in (("hot", 1), ("cold", cold_bytes // (2 * num_outputs * num_inputs))):
        linears = [nn.Linear(num_inputs, num_outputs, bias=False, dtype=torch.bfloat16) for _ in range(count)]
        products: dict[str, Sequence[Product]] = {
            name: [partial(NativeProjection([linear], [], [], instruction_set=name), route=None) for linear in linears]
            for name in instruction_sets()
        }
        products[TORCH] = [partial(F.linear, weight=linear.weight) for linear in linears]
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, num_inputs, dtype=torch.bfloat16)
            calls = {name: _in_turn(of_layers, x) for name, of_layers in products.items()}
            for name, times in timed(calls, budget_s).items():
                yield Row.of_times(name, cache, num_tokens, shape, times)


def _in_turn(products: Sequence[Product], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    endless = cycle(products)
    return lambda: next(endless)(x)


@torch.inference_mode()
def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--budget-s", type=float, default=2.0, help="seconds for a number of tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_rows = 2 * len(TOKENS) * (len(instruction_sets()) + 1)
    rows = list(tqdm(measure(arguments.budget_s), total=num_rows, unit="row", disable=None))
    print(f"{description()}, torch {torch.__version__}; {read_bandwidth(torch.device('cpu')) / 1e9:.1f} GB/s from memory")
    columns = ["set", "weights", *(f"{count} tokens" for count in TOKENS)]
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        lines.setdefault((row.name, row.cache), []).append(f"{row.median:.0f} ({row.low:.0f}–{row.high:.0f})")
    print_table(columns, [(*key, *cells) for key, cells in lines.items()])
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
