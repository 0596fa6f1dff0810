"""Times of a store with very many adapters: listing, and finding and opening an adapter. `python -m tests.bench.store`."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lori.base_identity import identify_files
from lori.cli.output import print_table
from lori.kernels.layout import Layout
from lori.packed_adapter import PackedReader
from lori.store.aliases import ALIASES_FOLDER
from lori.store.store import AdapterStore
from lori.summary import summarise

ADAPTER = Path(__file__).parents[2] / "server" / "adapters" / "math"


def make_store(root: Path, count: int) -> AdapterStore:
    """Return a store of `count` versions, each with an alias. All files are links to those of one real adapter."""
    store = AdapterStore(root)
    entry = store.publish(ADAPTER)
    for i in range(count - 1):
        folder = root / f"tenant-{i:05}@{entry.version}"
        folder.mkdir()
        for file in entry.folder.iterdir():
            (folder / file.name).hardlink_to(file)
        (root / ALIASES_FOLDER / f"tenant-{i:05}").write_text(f"{folder.name}\n")
    return store


def measured(act: Callable[[], object], repeats: int) -> str:
    """Return the median and the range of the milliseconds that `act` takes."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        act()
        seconds.append(1000 * (time.perf_counter() - started))
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", arguments.adapters)
        base, current = identify_files(None), store.current()
        reader = PackedReader(base, {name: Layout(shape[0], 32, torch.bfloat16) for name, shape in base.shapes.items()})
        acts: dict[str, Callable[[], object]] = {
            "list": store.list,
            "current (every name and what it means)": store.current,
            "summarise (every config)": lambda: summarise(current, base),
            "find a name": lambda: store.find("tenant-00042"),
            "find a version": lambda: store.find(f"tenant-00042@{store.find('math').version}"),
            "find and load": lambda: store.find("tenant-00042").load(base),
            "find and pack": lambda: reader.read_entry(store.find("tenant-00042")),
        }
        rows = [[act, measured(acts[act], arguments.repeats)] for act in acts]
    print_table([f"{arguments.adapters} adapters", "ms (min–max)"], rows)


if __name__ == "__main__":
    main()
