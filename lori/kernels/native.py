"""The compiled module `_lori_cpu`, which is built at install where there is a C++ compiler, and what it says of itself."""

import importlib
from types import ModuleType

import torch

from lori import rice
from lori.kernels.layout import Layout, Packed
from lori.kernels.layout import pack as pack_in_numpy
from lori.sparse import SparseB

VERSION = 5
"""Of the layout and the module's functions; CMakeLists.txt has the same."""


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("_lori_cpu")
    except ModuleNotFoundError as error:
        needs = "a C++17 compiler and Python's headers (apt install g++ python3-dev)"
        return None, f"the CPU kernel was not built at install ({error}): it needs {needs}, then install lori-server again"
    except ImportError as error:
        return None, f"the CPU kernel cannot be loaded ({error}): install the library it misses (apt install libgomp1)"
    found = getattr(module, "VERSION", None)
    if found != VERSION:
        return None, f"the CPU kernel is of another version ({found}, expected {VERSION}): install lori-server again"
    return module, ""


MODULE, MISSING = _load()
"""The module, or `None` and why it is not there."""


def instruction_sets() -> tuple[str, ...]:
    """Returns the instruction sets that the module has and this processor runs, the fastest first; none without the module."""
    return tuple(MODULE.instruction_sets()) if MODULE else ()


def description() -> str:
    """Returns what `add_delta` runs on a CPU, for a log."""
    if not MODULE:
        return "torch alone"
    return f"C++ ({instruction_sets()[0]}, {MODULE.COMPILER}{'' if MODULE.HAS_THREADS else ', one thread: no OpenMP'})"


def pack(layout: Layout, b: SparseB, scale: float = 1.0) -> Packed:
    """Packs scale * B, of rank R at most: the bytes of `lori.kernels.layout.pack`."""
    if MODULE is None:
        return pack_in_numpy(layout, b, scale)
    num_outputs, rank = b.shape
    values = b.values.float() * scale
    column_bytes = layout.column_dtype().itemsize
    blocks, starts = MODULE.pack(b.indices.numpy(), values.numpy(), num_outputs, rank, layout.dtype_name, column_bytes)
    return Packed(layout, torch.from_numpy(blocks), torch.from_numpy(starts))


def decode_mask(code: rice.Code, num_entries: int, num_kept: int) -> rice.Indices:
    """Returns what `lori.rice.decode` does, faster, and raises as it does."""
    indices: rice.Indices | None = MODULE.decode_mask(code, num_entries, num_kept) if MODULE else None
    return rice.decode(code, num_entries, num_kept) if indices is None else indices
