"""Type stub of the compiled module, from its bindings. `python -m tests.native_stub` writes lori/kernels/native/_lori_cpu.pyi.

After a change in lori/kernels/native, install the package again first.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lori.native import MISSING, MODULE

ROOT = Path(__file__).parents[1]
STUB = ROOT / "lori" / "kernels" / "native" / "_lori_cpu.pyi"
HEAD = "# `python -m tests.native_stub` writes this file.\n"


def native_stub() -> str:
    """Return the stub of the module that this environment imports, in ruff's format.

    The stub does not depend on the compiler.
    """
    with TemporaryDirectory() as folder:
        stub = Path(folder) / STUB.name
        _run("nanobind.stubgen", "--quiet", "--exclude-values", "--module", STUB.stem, "--output-file", str(stub))
        return _run("ruff", "format", "--stdin-filename", str(STUB), "-", given=HEAD + stub.read_text(encoding="utf-8"))


def _run(module: str, *arguments: str, given: str = "") -> str:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, input=given, stdout=subprocess.PIPE, cwd=ROOT, text=True, check=True).stdout


if __name__ == "__main__":
    if not MODULE:
        sys.exit(MISSING)
    STUB.write_text(native_stub(), encoding="utf-8")
