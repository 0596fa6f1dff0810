"""What memory there is for this process: what the machine has left, and what its container has."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows its groups of processes, and in which this one is. Elsewhere there are none."""


@dataclass(frozen=True, slots=True)
class _Files:
    """What a group's files are called, and the lines of memory.stat with what the system may give up: files that were read."""

    limit: str
    used: str
    cached: tuple[str, ...]


V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def free_memory() -> int:
    """Returns how many bytes this process may still take before the system has none, or kills it."""
    available: int = psutil.virtual_memory().available
    return max(0, min([available, *_left()]))


def _left() -> Iterator[int]:
    """Yields what each group that limits this process has left."""
    lines = OWN.read_text().splitlines() if OWN.exists() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (GROUPS / "memory", V1) if controllers else (GROUPS, V2)
        own = root / path.lstrip("/")  # of another namespace it may not be there, and its container's is the root
        for folder in (own, *own.parents):
            if folder.is_relative_to(root) and (left := _left_in(folder, files)) is not None:
                yield left


def _left_in(folder: Path, files: _Files) -> int | None:
    try:
        limit, used = ((folder / name).read_text().strip() for name in (files.limit, files.used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the root of all has no limit
        return None
    return None if limit == "max" else int(limit) - int(used) + sum(int(stat[name]) for name in files.cached)
