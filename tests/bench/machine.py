"""What machine a benchmark ran on."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lori.kernels.native import description
from tests.bench.timing import read_bandwidth

PACKAGES = ("torch", "transformers", "peft", "numpy")


def machine() -> dict[str, str | int | float]:
    """Returns the processor's name, how many cores this process may use, and the memory."""
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_gib": round(page * pages / 2**30, 1)}


def versions() -> dict[str, str]:
    """Returns the versions of Python and what counts most below, and which kernel adds the deltas."""
    installed = {name: installed for name in PACKAGES if (installed := _version(name))}
    return {"python": platform.python_version(), "kernel": description()} | installed


def bandwidth_of(core: int) -> float:
    """Returns how many bytes/s one thread reads on `core`, which this thread moves to and leaves again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pinned(core):
            return read_bandwidth(torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keeps this thread on `core` in the block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model_names = dict.fromkeys(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(iter(model_names), platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
