"""Memory in huge pages, if the system has them: random accesses then cause fewer TLB misses."""

import mmap
from contextlib import suppress

import torch

from lori.resources import free_memory


def zeros(num_bytes: int) -> torch.Tensor:
    """Return zeros (num_bytes,) uint8 on the CPU. All pages are touched here, so that no step waits for a page fault.

    Raises `MemoryError` if the machine or the container has too little free memory.
    """
    if num_bytes > (free := free_memory()):
        raise MemoryError(f"{num_bytes / 2**30:.1f} GiB of {free / 2**30:.1f} that are free")
    if not num_bytes:
        return torch.zeros(0, dtype=torch.uint8)
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows has no transparent huge pages
        return torch.zeros(num_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared pages are never huge
    with suppress(AttributeError, OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).zero_()
