"""The number of CPU threads: no more than the CPUs that are free and that this process may use.

At the end of each product all threads spin until the slowest is done, so one that shares its CPU delays all.
"""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

CGROUPS = Path("/sys/fs/cgroup")
STAT = Path("/proc/stat")
MEMBERSHIP = Path("/proc/self/cgroup")
VARIABLE = "OMP_NUM_THREADS"
NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")
"""Of the times of a CPU: Linux counts those of guests in `user` and `nice`, too."""


class BackgroundLoad:
    """What other processes take of the CPUs that this one may use, from now on."""

    def __init__(self) -> None:
        self._cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
        self._began, self._own, self._busy = time.monotonic(), time.process_time(), self._busy_s()

    def num_busy(self) -> float:
        """Return how many CPUs others have kept busy on average, from 0 to all."""
        elapsed = time.monotonic() - self._began
        others = self._busy_s() - self._busy - (time.process_time() - self._own)
        return min(max(others / elapsed, 0.0), len(self._cpus)) if elapsed else 0.0

    def num_free(self) -> int:
        """Return how many CPUs are free, at least 1. Load of up to a third of a CPU is ignored."""
        return max(1, math.ceil(len(self._cpus) - self.num_busy() - 1 / 3))

    def _busy_s(self) -> float:
        times = psutil.cpu_times(percpu=True)
        own = [cpu for number, cpu in zip(_cpu_numbers(len(times)), times, strict=False) if number in self._cpus]
        return float(sum(sum(cpu) - sum(getattr(cpu, name, 0.0) for name in NOT_BUSY) for cpu in own))


def _cpu_numbers(num_cpus: int) -> list[int]:
    """Return the numbers of the CPUs of which psutil tells: those that are online, which are not always the first ones."""
    try:
        lines = STAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return [*range(num_cpus)]  # not Linux
    return [int(line[3:].split()[0]) for line in lines if line.startswith("cpu") and line[3].isdigit()]


@contextmanager
def threads_restored() -> Iterator[None]:
    """Restore torch's number of CPU threads after the block."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_threads(number: int) -> None:
    """Have torch compute with `number` CPU threads from now on.

    0 is torch's own choice, which OMP_NUM_THREADS may name; without it, no more than the container's share of the CPUs.
    """
    if number:
        torch.set_num_threads(number)
    elif VARIABLE not in os.environ and (quota := cpu_quota()) < torch.get_num_threads():
        torch.set_num_threads(max(1, int(quota)))
        logger.info("computing with %d CPU threads, as many CPUs as this container may use", torch.get_num_threads())


def avoid_busy_cpus(load: BackgroundLoad) -> None:
    """Take no more threads than there are CPUs free under `load`, unless OMP_NUM_THREADS says how many."""
    if VARIABLE not in os.environ and (num_free := load.num_free()) < torch.get_num_threads():
        logger.info("computing with %d of %d CPU threads: the other CPUs are busy (--threads)", num_free, torch.get_num_threads())
        torch.set_num_threads(num_free)


def warn_if_busy(load: BackgroundLoad) -> None:
    """Say where a service that will run for long has more threads than there are CPUs free under `load`: it keeps them."""
    if (num_free := load.num_free()) < torch.get_num_threads():
        logger.warning(
            "other processes keep %.1f CPUs busy, which slows all %d threads; while they do, --threads %d is faster",
            load.num_busy(), torch.get_num_threads(), num_free,
        )  # fmt: skip


def cpu_quota() -> float:
    """Return how many CPUs this process's control group may use (cgroup v2); infinity where no limit is known."""
    try:
        path = MEMBERSHIP.read_text(encoding="ascii").partition("0::/")[2].strip()
    except (OSError, UnicodeDecodeError):
        return math.inf  # not Linux, or a name that is not read here
    folders = [CGROUPS / path, *(CGROUPS / path).parents]
    return min(_quota(folder / "cpu.max") for folder in folders if folder.is_relative_to(CGROUPS))


def _quota(file: Path) -> float:
    try:
        quota, period = file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return math.inf  # the root has none
    return math.inf if quota == "max" else int(quota) / int(period)
