"""Triton kernels compiled for a device that this machine may lack, in a separate process in which Triton does not interpret."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).parents[1]


def properties(
    kernel: Any, sizes: Mapping[str, Any], types: Mapping[str, str], other_type: str, capability: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Compile `kernel` and return properties of its code.

    Arguments named in `sizes` are constants. The others have the type that `types` gives, or else `other_type`.
    """
    constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    signature = {name: "constexpr" if name in constants else types.get(name, other_type) for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "is_elf": code.asm["cubin"][:4] == b"\x7fELF",
        "multiplies_matrices": "mma" in code.asm["ptx"],
        "shared": code.metadata.shared,
    }


def compiled_elsewhere(module: str, call: str, cache: Path) -> dict[str, dict[str, Any]]:
    """Return the result of `call`, an expression of the names in `module`, evaluated in another process."""
    script = f"import json; from {module} import compile_ahead; print(json.dumps({call}))"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return result
