"""Memory in huge pages, where the system has them: places that no processor foresees cost fewer look-ups of addresses."""

import mmap
from contextlib import suppress

import torch

from lori.resources import free_memory


def zeros(num_bytes: int) -> torch.Tensor:
    """Return zeros (num_bytes,) uint8 on the CPU. They have their room at once: no step waits until the system clears a page.

    Raises `MemoryError` where the machine, or the container, has not so much.
    """
    if num_bytes > (free := free_memory()):
        raise MemoryError(f"{num_bytes / 2**30:.1f} GiB of {free / 2**30:.1f} that are free")
    if not num_bytes:
        return torch.zeros(0, dtype=torch.uint8)
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows: its pages are all of one size
        return torch.zeros(num_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones are never huge
    with suppress(AttributeError, OSError):  # a system without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).zero_()
