"""Crossover of the CPU kernel: the number of tokens of one adapter from which a dense B beats the packed B, and its choice.

`python -m tests.bench.crossover`: bf16, r = 32, one thread by default. "dense" includes unpacking B. The constants in
`lori.kernels.cpu` come from this table.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm

from lori.cli.output import print_table
from lori.kernels import Operands, Route, Term
from lori.kernels.cpu import add_delta, max_packed_tokens, unpack
from lori.kernels.native import MISSING, instruction_sets
from lori.kernels.route import LONG_SEGMENT
from lori.sparse import SparseB
from tests.bench.timing import timed

RANK = 32
COLUMNS = ["B", "kept", "tokens", "packed, us", "dense, us", "packed / dense", "the kernel takes"]


def rows(instruction_set: str) -> Iterator[list[str]]:
    """Yield the rows of the table."""
    for num_outputs in (576, 4096):
        for density in (0.1, 0.3, 1.0):
            operands = Operands(1, RANK, num_outputs, torch.bfloat16, "cpu")
            mask = torch.rand(num_outputs, RANK) < density
            operands.put(0, operands.pack(SparseB.from_dense(torch.randn(num_outputs, RANK), mask)), 0)
            for num_tokens in (32, 64, 128, 256, 512, 1024, 4096):
                y, s = torch.randn(num_tokens, num_outputs).bfloat16(), torch.randn(num_tokens, 1, RANK).bfloat16()
                packed, dense = measure(y, s, operands, instruction_set)
                takes_dense = num_tokens >= LONG_SEGMENT and num_tokens > max_packed_tokens(operands, 0)
                yield [
                    f"{num_outputs} x {RANK}", f"{100 * density:.0f}%", str(num_tokens), f"{packed:.1f}", f"{dense:.1f}",
                    f"{packed / dense:.2f}", "dense" if takes_dense else "packed",
                ]  # fmt: skip


def measure(y: torch.Tensor, s: torch.Tensor, operands: Operands, instruction_set: str) -> tuple[float, float]:
    """Return the median times in us of one segment of all tokens, packed and dense."""
    route = Route.from_terms([Term(0, len(y), 0, 1e-6)], len(y))
    times = timed(
        {
            "packed": lambda: add_delta(y, s, operands, route, instruction_set),
            "dense": lambda: y.addmm_(s[:, 0], unpack(operands, 0).T, alpha=1e-6),
        },
        budget_s=0.2,
    )
    return times["packed"].median, times["dense"].median


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruction-set", choices=instruction_sets(), help="the fastest by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if MISSING:
        sys.exit(f"error: {MISSING}")
    torch.set_num_threads(arguments.threads)
    measured = rows(arguments.instruction_set or instruction_sets()[0])
    print_table(COLUMNS, list(tqdm(measured, total=2 * 3 * 7, unit="row", disable=None)))


if __name__ == "__main__":
    main()
