"""The highest instruction set that a process may use, and its effect on every choice of code."""

from collections.abc import Sequence

import pytest
import torch

from lori import native
from lori.base_model import default_dtype
from lori.errors import LoriError
from lori.kernels import cpu
from lori.native import ISAS, MAX_ISA_VARIABLE, MODULE, instruction_sets
from server.engine.model.decoder import Heads
from server.engine.model.native_ops import NativeOps
from tests.lori.instruction_sets import FLAGS
from tests.lori.operands import SIZES, make_case

BF16, CPU = torch.bfloat16, torch.device("cpu")
HEADS = [Heads(num_heads=4, num_kv_heads=2, head_size=32, scale=32**-0.5)]
pytestmark = pytest.mark.needs("kernels")


class Module:
    """Stand-in for the compiled module on a fake processor. Records the instruction sets that are requested."""

    COMPILER, HAS_THREADS = "GNU 12", True

    def __init__(self, supported: Sequence[str]) -> None:
        self.supported = supported
        self.chosen: list[str] = []

    def instruction_sets(self) -> Sequence[str]:
        return self.supported

    def Operands(self, *arguments: object) -> None:  # noqa: N802
        self.chosen.append(str(arguments[-1]))

    def Layers(self, isa: str, dtype: str) -> object:  # noqa: N802
        self.chosen.append(isa)
        assert MODULE
        return MODULE.Layers("portable", dtype)

    def __getattr__(self, name: str) -> object:
        return getattr(MODULE, name)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    """Return the stand-in for a processor with every instruction set, including AMX."""
    module = Module(ISAS[::-1])
    for path in ("lori.native", "lori.kernels.cpu", "server.engine.model.native_ops"):
        monkeypatch.setattr(f"{path}.MODULE", module)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv(MAX_ISA_VARIABLE, raising=False)
    return module


@pytest.mark.parametrize(
    ("limit", "fastest", "dtype"),
    [
        (None, "amx", BF16),
        ("", "amx", BF16),
        ("amx", "amx", BF16),
        ("avx512_bf16", "avx512_bf16", BF16),
        ("avx512", "avx512", torch.float32),
        ("avx2", "avx2", torch.float32),
        ("portable", "portable", torch.float32),
    ],
)
def test_every_choice_by_cpu_obeys_the_limit(
    limit: str | None, fastest: str, dtype: torch.dtype, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setenv(MAX_ISA_VARIABLE, limit)
    assert instruction_sets() == tuple(ISAS[ISAS.index(fastest) :: -1])
    assert default_dtype() == dtype
    cpu.bind(make_case(SIZES[0], BF16, "identical", 1).operands)
    NativeOps(HEADS, 1, 16, BF16)
    assert module.chosen == [fastest, fastest]
    name = fastest if fastest == "amx" else f"{fastest} by {MAX_ISA_VARIABLE}"
    assert native.description() == f"C++ ({name}, GNU 12)"


def test_the_sets_are_those_of_the_build() -> None:
    assert tuple(FLAGS) == ISAS


def test_an_instruction_set_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_ISA_VARIABLE, "portable")
    operands = make_case(SIZES[0], torch.float32, "identical", 1).operands
    with pytest.raises(ValueError, match="this process does not run avx2, expected one of portable"):
        cpu.bind(operands, "avx2")


def test_an_unknown_limit_is_an_error_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_ISA_VARIABLE, "AVX2")
    message = "^LORI_MAX_CPU_ISA=AVX2 is not an instruction set, expected one of portable, avx2, avx512, avx512_bf16, amx$"
    for ask in (instruction_sets, default_dtype):
        with pytest.raises(LoriError, match=message):
            ask()
