"""Timing of interleaved functions, so that a drift of the machine's speed affects all alike."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

import torch

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)
SHORTEST_S = 2e-3
"""Minimum seconds of a repetition, which calls a function many times. So the cache contents of other functions do not matter."""


@dataclass(frozen=True, slots=True)
class Times:
    """Times of one call in us: median, first quartile and third quartile over the rounds."""

    median: float
    low: float
    high: float


def timed(calls: Mapping[Key, Call], budget_s: float, min_rounds: int = 7, max_rounds: int = 200) -> dict[Key, Times]:
    """Run `calls` in rounds for about `budget_s` seconds and return the times of each."""
    counts = {name: _count(call) for name, call in calls.items()}
    times_us: dict[Key, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget_s
    for number in range(max_rounds):
        if number >= min_rounds and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times_us[name].append(_repeat(call, counts[name]) / counts[name] * 1e6)
    quartiles = {name: quantiles(times, n=4) for name, times in times_us.items()}
    return {name: Times(median(times), quartiles[name][0], quartiles[name][2]) for name, times in times_us.items()}


def read_bandwidth(device: torch.device, num_bytes: int = 2**28) -> float:
    """Return the memory bandwidth in bytes/s: the best of several dot products of large arrays, on a CPU with torch's threads."""
    a, b = (torch.ones(num_bytes // 4, device=device) for _ in range(2))
    return max(2 * num_bytes / _repeat(lambda: torch.dot(a, b), 1) for _ in range(7))


def _count(call: Call) -> int:
    once = max(_repeat(call, 1), 1e-7)
    return max(1, int(SHORTEST_S / once))


def _repeat(call: Call, count: int) -> float:
    call()
    _wait()
    started = time.perf_counter()
    for _ in range(count):
        call()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
