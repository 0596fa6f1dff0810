"""The type stub of the compiled module, which mypy reads."""

import pytest

from tests.native_stub import STUB, native_stub

RENEW = "install again if lori/kernels/native has changed, then run: python -m tests.native_stub"


@pytest.mark.needs("kernels")
def test_the_stub_has_the_types_of_the_built_module() -> None:
    assert STUB.read_text(encoding="utf-8") == native_stub(), f"{STUB.name} differs from the installed module: {RENEW}"
