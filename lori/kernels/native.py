"""The compiled module `_lori_cpu`, which is built at install where there is a C++ compiler, and what it says of itself."""

import importlib
import os
from types import ModuleType

import torch

from lori import rice
from lori.errors import LoriError
from lori.kernels.layout import Layout, Packed
from lori.kernels.layout import pack as pack_in_numpy
from lori.sparse import SparseB

VERSION = 5
"""Of the layout and the module's functions; CMakeLists.txt has the same."""
MAX_ISA_VARIABLE = "LORI_MAX_CPU_ISA"
"""The environment variable that names the highest instruction set a process may use; all are allowed where it is not set."""
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""Its values: CPU instruction sets, in ascending order. Everything that chooses code by the CPU asks `is_allowed`."""


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


def max_isa() -> str:
    """Return the highest instruction set that this process may use. Raises `LoriError` where it is unknown."""
    name = os.environ.get(MAX_ISA_VARIABLE) or ISAS[-1]
    if name not in ISAS:
        raise LoriError(f"{MAX_ISA_VARIABLE}={name} is not an instruction set, expected one of {', '.join(ISAS)}")
    return name


def is_allowed(isa: str) -> bool:
    """Return whether this process may use an instruction set of `ISAS`. Raises as `max_isa` does."""
    return ISAS.index(isa) <= ISAS.index(max_isa())


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that the module has, this processor runs and `max_isa` allows, the fastest first.

    Empty without the module. Raises as `max_isa` does.
    """
    return tuple(name for name in MODULE.instruction_sets() if is_allowed(name)) if MODULE else ()


def choose(isa: str | None = None) -> str:
    """Return `isa`, or the fastest of `instruction_sets()`. Raises `ValueError` where `isa` is not one of them."""
    names = instruction_sets()
    if isa and isa not in names:
        raise ValueError(f"this process does not run {isa}, expected one of {', '.join(names)}")
    return isa or names[0]


def has_amx() -> bool:
    """Return whether this processor has AMX tiles and `max_isa` allows them: torch's bf16 products are the fastest then."""
    return is_allowed("amx") and torch.cpu._is_amx_tile_supported()  # no public function says it


def description() -> str:
    """Return what `add_delta` runs on a CPU, for a log."""
    if not MODULE:
        return "torch alone"
    limit = "" if choose() == MODULE.instruction_sets()[0] else f" by {MAX_ISA_VARIABLE}"
    return f"C++ ({choose()}{limit}, {MODULE.COMPILER}{'' if MODULE.HAS_THREADS else ', one thread: no OpenMP'})"


def pack(layout: Layout, b: SparseB, scale: float = 1.0) -> Packed:
    """Pack scale * B, of rank R at most: the bytes of `lori.kernels.layout.pack`."""
    if MODULE is None:
        return pack_in_numpy(layout, b, scale)
    num_outputs, rank = b.shape
    values = b.values.float() * scale
    column_bytes = layout.column_dtype().itemsize
    blocks, starts = MODULE.pack(b.indices.numpy(), values.numpy(), num_outputs, rank, layout.dtype_name, column_bytes)
    return Packed(layout, torch.from_numpy(blocks), torch.from_numpy(starts))


def decode_mask(code: rice.Code, num_entries: int, num_kept: int) -> rice.Indices:
    """Return what `lori.rice.decode` does, faster, and raises as it does."""
    indices: rice.Indices | None = MODULE.decode_mask(code, num_entries, num_kept) if MODULE else None
    return rice.decode(code, num_entries, num_kept) if indices is None else indices
