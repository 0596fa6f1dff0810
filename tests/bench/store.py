"""How long a store of very many adapters takes to list, and to find and open one: `python -m tests.bench.store`."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lori.aliases import ALIASES_FOLDER
from lori.cli.output import print_table
from lori.store import AdapterStore

ADAPTER = Path(__file__).parents[2] / "server" / "adapters" / "math"


def make_store(root: Path, count: int) -> AdapterStore:
    """Returns a store of `count` versions, an alias each; the files are those of one real adapter, which has its own name too."""
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
    """Returns the median and the range of the milliseconds that `act` takes."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        act()
        seconds.append(1000 * (time.perf_counter() - started))
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", arguments.adapters)
        acts: dict[str, Callable[[], object]] = {
            "list": store.list,
            "current (every name and what it means)": store.current,
            "find a name": lambda: store.find("tenant-00042"),
            "find a version": lambda: store.find(f"tenant-00042@{store.find('math').version}"),
            "find and load": lambda: store.find("tenant-00042").load(),
        }
        rows = [[act, measured(acts[act], arguments.repeats)] for act in acts]
    print_table([f"{arguments.adapters} adapters", "ms (min–max)"], rows)


if __name__ == "__main__":
    main()
