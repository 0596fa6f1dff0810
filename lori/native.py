"""The compiled module `_lori_cpu`, its capabilities, and the decoding of a mask with or without it.

The module is built at install if there is a C++ compiler.
"""

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING

from lori import rice
from lori.errors import LoriError

VERSION = 10
"""Version of the layout and of the module's functions; must equal the one in CMakeLists.txt."""
MAX_ISA_VARIABLE = "LORI_MAX_CPU_ISA"
"""Environment variable for the highest instruction set that a process may use. If it is not set, all are allowed."""
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""Values of the variable: CPU instruction sets, ascending. All code that depends on the instruction set must use `is_allowed`."""


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("_lori_cpu")
    except ModuleNotFoundError as error:
        needs = "a C++17 compiler and Python's headers (apt install g++ python3-dev)"
        return None, f"the CPU kernel was not built at install ({error}): it needs {needs}, then install lori-server again"
    except ImportError as error:
        return None, f"the CPU kernel cannot be loaded ({error}): install the library it misses (apt install libgomp1)"
    version = getattr(module, "VERSION", None)
    if version != VERSION:
        return None, f"the CPU kernel is of another version ({version}, expected {VERSION}): install lori-server again"
    return module, ""


_loaded, MISSING = _load()
if TYPE_CHECKING:
    import _lori_cpu  # kernels/native/_lori_cpu.pyi

    MODULE = _lori_cpu
else:
    MODULE = _loaded
"""The compiled module. If it is missing, `MODULE` is `None` and `MISSING` is the reason.

Python has no type for a module or `None`, so type checkers take the module as present. Test it with `if MODULE` or
`if not MODULE`: they take the branch of `if MODULE is None` as unreachable and do not check it.
"""


def max_isa() -> str:
    """Return the highest instruction set that this process may use. Raises `LoriError` if the variable names an unknown one."""
    name = os.environ.get(MAX_ISA_VARIABLE) or ISAS[-1]
    if name not in ISAS:
        raise LoriError(f"{MAX_ISA_VARIABLE}={name} is not an instruction set, expected one of {', '.join(ISAS)}")
    return name


def is_allowed(isa: str) -> bool:
    """Return whether this process may use the instruction set `isa`, one of `ISAS`. Raises as `max_isa`."""
    return ISAS.index(isa) <= ISAS.index(max_isa())


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that the module supports, this processor has and `max_isa` allows, the fastest first.

    Empty without the module. Raises as `max_isa`.
    """
    return tuple(name for name in MODULE.instruction_sets() if is_allowed(name)) if MODULE else ()


def choose(isa: str | None = None) -> str:
    """Return `isa`, by default the fastest of `instruction_sets()`. Raises `ValueError` if `isa` is not one of them."""
    names = instruction_sets()
    if isa and isa not in names:
        raise ValueError(f"this process does not run {isa}, expected one of {', '.join(names)}")
    return isa or names[0]


def is_limited() -> bool:
    """Return whether this processor has a better instruction set than `max_isa` allows."""
    return bool(MODULE) and choose() != MODULE.instruction_sets()[0]


def description() -> str:
    """Return a description of the code that `add_delta` runs on a CPU, for a log."""
    if not MODULE:
        return "torch alone"
    limit = f" by {MAX_ISA_VARIABLE}" if is_limited() else ""
    return f"C++ ({choose()}{limit}, {MODULE.COMPILER}{'' if MODULE.HAS_THREADS else ', one thread: no OpenMP'})"


def decode_mask(code: rice.Code, num_entries: int, nnz: int) -> rice.Indices:
    """Return the same as `lori.rice.decode`, faster. Raises as `lori.rice.decode`."""
    indices = MODULE.decode_mask(code, num_entries, nnz) if MODULE else None
    return rice.decode(code, num_entries, nnz) if indices is None else indices
