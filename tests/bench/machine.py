"""The machine of a benchmark: hardware, versions and memory bandwidth."""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lori.native import description
from tests.bench.timing import read_bandwidth

PACKAGES = ("torch", "transformers", "peft", "numpy")


def machine() -> dict[str, str | int | float]:
    """Return the processor's name, the number of cores that this process may use, and the memory."""
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_gib": round(page * pages / 2**30, 1)}


def versions() -> dict[str, str]:
    """Return the versions of Python and `PACKAGES`, and the description of the CPU kernel."""
    installed = {name: installed for name in PACKAGES if (installed := _version(name))}
    return {"python": platform.python_version(), "kernel": description()} | installed


def bandwidth_of(cores: Sequence[int]) -> float:
    """Return the bytes/s that a thread on each of `cores` reads from memory together. This thread runs there meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(cores))
    try:
        with pinned(*cores):
            return read_bandwidth(torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def pinned(*cores: int) -> Iterator[None]:
    """Context manager: pin this thread to `cores`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
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
