"""The products and layers in C++ under the address and undefined behaviour sanitizers, for every instruction set."""

import subprocess
from pathlib import Path

import pytest

from lori.kernels import native
from tests.lori.instruction_sets import FLAGS, SANITIZE

SOURCES = Path(native.__file__).parent / "native"


@pytest.mark.sanitizer
@pytest.mark.needs("compiler")
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_products_and_layers_read_and_write_nothing_but_their_arrays(tmp_path: Path, instruction_set: str) -> None:
    files = [SOURCES / f"layers_{instruction_set}.cpp", Path(__file__).parent / "sanitize_layers.cpp"]
    flags = f"{SANITIZE} -Wno-psabi -I{SOURCES} {FLAGS[instruction_set]} -DLAYERS=layers_{instruction_set}"
    if (SOURCES / f"product_{instruction_set}.cpp").exists():
        files += [SOURCES / "product.cpp", SOURCES / f"product_{instruction_set}.cpp"]
        flags += f" -DMULTIPLY=multiply_{instruction_set}"
    program = tmp_path / "sanitize"
    subprocess.run(["g++", *flags.split(), *map(str, files), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.startswith("checked ")
