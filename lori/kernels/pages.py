"""Memory in huge pages, if the system has them: random accesses then cause fewer TLB misses."""

import mmap
from contextlib import suppress

import torch

from lori.resources import free_memory

HUGE_PAGE = 1 << 21
LINE = 64
"""Bytes of a line of the cache."""


def zeros(num_bytes: int) -> torch.Tensor:
    """Return zeros (num_bytes,) uint8 on the CPU. All pages are touched here, so that no step waits for a page fault.

    Raises `MemoryError` if the machine or the container has too little free memory.
    """
    _check_free(num_bytes)
    return _reserved(num_bytes).zero_()


class Arena:
    """Memory for small arrays that live equally long: one after the other they fill huge pages, which none would alone."""

    def __init__(self, num_bytes: int = 1 << 26) -> None:
        """`num_bytes` are reserved at a time. Only what `zeros` returns takes memory."""
        self._num_bytes, self._rest = num_bytes, torch.zeros(0, dtype=torch.uint8)

    def zeros(self, num_bytes: int) -> torch.Tensor:
        """Return zeros as the function `zeros` does, from a cache line's beginning on."""
        _check_free(num_bytes)
        taken = -(-num_bytes // LINE) * LINE
        if taken > len(self._rest):
            self._rest = _reserved(max(taken, self._num_bytes))
        array, self._rest = self._rest[:num_bytes], self._rest[taken:]
        return array.zero_()


def _check_free(num_bytes: int) -> None:
    if num_bytes > (free := free_memory()):
        raise MemoryError(f"{num_bytes / 2**30:.1f} GiB of {free / 2**30:.1f} that are free")


def _reserved(num_bytes: int) -> torch.Tensor:
    """Return memory (num_bytes,) uint8 that no page has been touched of, from a huge page's beginning on where there are any."""
    if not num_bytes or not hasattr(mmap, "MAP_PRIVATE"):  # Windows has no transparent huge pages
        return torch.zeros(num_bytes, dtype=torch.uint8)
    size = num_bytes + HUGE_PAGE if num_bytes >= HUGE_PAGE else num_bytes
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared pages are never huge
    with suppress(AttributeError, OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    return memory[-memory.data_ptr() % HUGE_PAGE :][:num_bytes] if size > num_bytes else memory
