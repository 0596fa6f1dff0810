"""Benchmark of the selection among many adapters: `lori.auto_weights.SelectionIndex`.

    python -m tests.bench.adapter_selection [--num-adapters 10000] [--num-prompts 500]

The adapters are copies of the demo adapters' statistics with other means; prompts are drawn from the Gaussians of some. Prints
the time to build the index and the size of what it adds, the time of a selection (before each, something else uses the caches,
as a step of the engine does), and the fraction of prompts that get the adapter from whose Gaussian they were drawn.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from lori.auto_weights import SelectionIndex
from lori.prompt_statistics import BACKGROUNDS, Background
from lori.store.entry import Entry
from tests.lori.features import copies, draw_prompt

DEMO_ADAPTERS = Path(__file__).parents[2] / "server" / "adapters"
SPREAD = 0.7
"""Standard deviation of a copy's means, in the space in which the background's covariance is the identity."""
CACHE_BYTES = 64 << 20


def main() -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-adapters", type=int, default=10_000)
    parser.add_argument("--num-prompts", type=int, default=500)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    [file] = BACKGROUNDS.glob("*.safetensors")
    background = Background.from_bytes(str(file), file.read_bytes())
    folders = sorted(folder for folder in DEMO_ADAPTERS.iterdir() if folder.is_dir())
    originals = [own for folder in folders if (own := Entry(folder.name, folder).prompt_statistics())]
    adapters = copies(originals, arguments.num_adapters, SPREAD, rng)
    started = time.perf_counter()
    index = SelectionIndex(background, adapters)
    print(f"{len(adapters)} adapters: built in {time.perf_counter() - started:.2f} s, {index.num_bytes / 2**20:.1f} MiB")
    other, allowed = np.zeros(CACHE_BYTES // 8), np.ones(len(adapters), dtype=bool)
    times, num_own = [], 0
    for own in rng.integers(len(adapters), size=arguments.num_prompts):
        z = draw_prompt(adapters[own].gaussians, background, seed=int(rng.integers(2**32)))
        other += 1
        started = time.perf_counter()
        selection = index.select(z, 3, allowed)
        times.append(1e3 * (time.perf_counter() - started))
        num_own += own in selection.adapters
    tenths = statistics.quantiles(times, n=10)
    print(f"a selection: {statistics.median(times):.2f} ms ({tenths[0]:.2f} to {tenths[-1]:.2f}, the middle eight tenths)")
    print(f"its own adapter: {num_own / len(times):.1%} of {len(times)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
