"""Memory in huge pages, if the system has them: random accesses then cause fewer TLB misses."""

import mmap
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from lori.resources import free_memory

HUGE_PAGE, CACHE_LINE = 1 << 21, 64
"""Bytes of a huge page and of a cache line on x86."""


def zeros(num_bytes: int) -> torch.Tensor:
    """Return zeros (num_bytes,) uint8 on the CPU. All pages are touched here, so that no step waits for a page fault.

    Raises `MemoryError` if the machine or the container has too little free memory.
    """
    _check_free(num_bytes)
    return torch.from_numpy(_reserve(num_bytes)).zero_()


class Arena:
    """Memory for arrays that are freed together. They are packed one after another, so that small ones share huge pages.

    Reserves a block of memory at a time, of which only the arrays are touched. A block is freed with its last array. Not
    thread-safe.
    """

    def __init__(self, num_block_bytes: int = 1 << 26) -> None:
        self._num_block_bytes = num_block_bytes
        self._rest = np.zeros(0, np.uint8)  # no tensor, which could be of inference mode alone

    def zeros(self, num_bytes: int) -> torch.Tensor:
        """Same as the function `zeros`; the array is aligned to a cache line."""
        num_taken = -(-num_bytes // CACHE_LINE) * CACHE_LINE
        if num_taken > self._num_block_bytes:
            return zeros(num_bytes)
        _check_free(num_bytes)
        if num_taken > len(self._rest):
            self._rest = _reserve(self._num_block_bytes)
        array, self._rest = self._rest[:num_bytes], self._rest[num_taken:]
        return torch.from_numpy(array).zero_()


def _check_free(num_bytes: int) -> None:
    if num_bytes > (free := free_memory()):
        raise MemoryError(f"{num_bytes / 2**30:.1f} GiB of {free / 2**30:.1f} that are free")


def _reserve(num_bytes: int) -> NDArray[np.uint8]:
    """Return untouched memory (num_bytes,), aligned to a huge page if it is as large as one."""
    if not num_bytes or not hasattr(mmap, "MAP_PRIVATE"):  # Windows has no transparent huge pages
        return np.zeros(num_bytes, np.uint8)
    size = num_bytes + HUGE_PAGE if num_bytes >= HUGE_PAGE else num_bytes
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared pages are never huge
    with suppress(AttributeError, OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    return memory[-memory.ctypes.data % HUGE_PAGE :][:num_bytes] if size > num_bytes else memory
