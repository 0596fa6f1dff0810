"""The products and layers in C++ under the address and undefined behaviour sanitizers, for every instruction set."""

from pathlib import Path

import pytest

from lori import native
from tests.lori.sanitized import PROGRAMS, SOURCES, compile_kernel, compile_portable, run_program, sets_with

pytestmark = [pytest.mark.sanitizer, pytest.mark.needs("compiler")]


# AMX tiles are emulated, so their accesses are checked too, and the processor need not have AMX.
EMULATED = ["amx"] if "avx512_bf16" in native.instruction_sets() else []


@pytest.mark.parametrize("instruction_set", dict.fromkeys([*sets_with("layers"), *EMULATED]))
def test_layers_read_and_write_nothing_but_their_arrays(tmp_path: Path, instruction_set: str) -> None:
    layers = compile_kernel("layers", "layers", instruction_set)
    assert run_program(tmp_path, layers, compile_portable(PROGRAMS / "sanitize_layers.cpp")).startswith("checked ")


@pytest.mark.parametrize("instruction_set", dict.fromkeys([*sets_with("product"), *EMULATED]))
def test_products_read_and_write_nothing_but_their_arrays(tmp_path: Path, instruction_set: str) -> None:
    product = compile_kernel("product", "multiply", instruction_set)
    rest = compile_portable(SOURCES / "product.cpp"), compile_portable(PROGRAMS / "sanitize_product.cpp")
    assert run_program(tmp_path, product, *rest).startswith("checked ")
