"""CPU threads and memory that this process may use: free on the machine, and within the limits of the container.

At the end of each matrix product all threads spin until the slowest is done, so a thread that shares its CPU delays all threads.
"""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)


CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""The folder of Linux's control groups, and the file that names the groups of this process. Missing on other systems."""


@dataclass(frozen=True, slots=True)
class _Files:
    """Names of a control group's memory files, and the keys in memory.stat for page cache that the kernel can reclaim."""

    limit: str
    used: str
    cached: tuple[str, ...]


V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def free_memory() -> int:
    """Return the number of bytes this process may still allocate before memory runs out or a control group's limit kills it."""
    available: int = psutil.virtual_memory().available
    return max(0, min([available, *_group_headrooms()]))


def _group_headrooms() -> Iterator[int]:
    """Yield the remaining bytes of each control group that limits this process."""
    lines = MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (CGROUPS / "memory", V1) if controllers else (CGROUPS, V2)
        group = root / path.lstrip("/")  # missing in another cgroup namespace; the root is then the container's group
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (headroom := _headroom(folder, files)) is not None:
                yield headroom


def _headroom(folder: Path, files: _Files) -> int | None:
    try:
        limit, used = ((folder / name).read_text().strip() for name in (files.limit, files.used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the root group has no limit
        return None
    return None if limit == "max" else int(limit) - int(used) + sum(int(stat[name]) for name in files.cached)


STAT = Path("/proc/stat")
VARIABLE = "OMP_NUM_THREADS"
NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")
"""CPU times that do not count as busy. Linux counts guest times in `user` and `nice` already."""


class BackgroundLoad:
    """Load by other processes on the CPUs that this process may use, measured since construction."""

    def __init__(self) -> None:
        self._cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
        self._began, self._process_s_before, self._busy_s_before = time.monotonic(), time.process_time(), self._busy_s()

    def num_busy(self) -> float:
        """Return the average number of CPUs that other processes kept busy, from 0 to all."""
        elapsed = time.monotonic() - self._began
        others_s = self._busy_s() - self._busy_s_before - (time.process_time() - self._process_s_before)
        return min(max(others_s / elapsed, 0.0), len(self._cpus)) if elapsed else 0.0

    def num_free(self) -> int:
        """Return the number of free CPUs, at least 1. Ignores a load of up to a third of a CPU."""
        return max(1, math.ceil(len(self._cpus) - self.num_busy() - 1 / 3))

    def _busy_s(self) -> float:
        times = psutil.cpu_times(percpu=True)
        cpus = [cpu for number, cpu in zip(_cpu_numbers(len(times)), times, strict=False) if number in self._cpus]
        return float(sum(sum(cpu) - sum(getattr(cpu, name, 0.0) for name in NOT_BUSY) for cpu in cpus))


def _cpu_numbers(num_cpus: int) -> list[int]:
    """Return the numbers of the CPUs that psutil reports: the online CPUs, which need not be the first ones."""
    try:
        lines = STAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return [*range(num_cpus)]  # not Linux
    return [int(line[3:].split()[0]) for line in lines if line.startswith("cpu") and line[3].isdigit()]


@contextmanager
def threads_restored() -> Iterator[None]:
    """Restore torch's number of CPU threads after the block."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def use_threads(number: int) -> None:
    """Set torch's number of CPU threads to `number`.

    0 keeps torch's default, which OMP_NUM_THREADS can set. If OMP_NUM_THREADS is not set, 0 also limits the threads to the
    container's share of the CPUs.
    """
    if number:
        torch.set_num_threads(number)
    elif VARIABLE not in os.environ and (quota := cpu_quota()) < torch.get_num_threads():
        torch.set_num_threads(max(1, int(quota)))
        logger.info("computing with %d CPU threads, as many CPUs as this container may use", torch.get_num_threads())


def avoid_busy_cpus(load: BackgroundLoad) -> None:
    """Lower torch's number of threads to the number of CPUs free under `load`, unless OMP_NUM_THREADS is set."""
    if VARIABLE not in os.environ and (num_free := load.num_free()) < torch.get_num_threads():
        logger.info("computing with %d of %d CPU threads: the other CPUs are busy (--threads)", num_free, torch.get_num_threads())
        torch.set_num_threads(num_free)


def warn_if_busy(load: BackgroundLoad) -> None:
    """Log a warning if torch has more threads than CPUs are free under `load`. For long-running services: keeps the threads."""
    if (num_free := load.num_free()) < torch.get_num_threads():
        logger.warning(
            "other processes keep %.1f CPUs busy, which slows all %d threads; while they do, --threads %d is faster",
            load.num_busy(), torch.get_num_threads(), num_free,
        )  # fmt: skip


def cpu_quota() -> float:
    """Return the number of CPUs that this process's control group may use (cgroup v2); infinity without a known limit."""
    try:
        path = MEMBERSHIP.read_text(encoding="ascii").partition("0::/")[2].strip()
    except (OSError, UnicodeDecodeError):
        return math.inf  # not Linux, or a group name that is not ASCII
    folders = [CGROUPS / path, *(CGROUPS / path).parents]
    return min(_quota(folder / "cpu.max") for folder in folders if folder.is_relative_to(CGROUPS))


def _quota(file: Path) -> float:
    try:
        quota, period = file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return math.inf  # the root group has no limit
    return math.inf if quota == "max" else int(quota) / int(period)
