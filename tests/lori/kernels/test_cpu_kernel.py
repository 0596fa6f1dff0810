"""The kernel in C++: agreement of its instruction sets, independence of threads, and refusal of wrong arrays.

Shapes: T tokens, A bases, R rank, D outputs, S slots.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from lori import native
from lori.kernels import Operands, Route, Term, cpu, reference
from lori.kernels.cpu import add_delta
from tests.cases import all_pairs
from tests.lori.operands import POPULARITY, SIZES, Case, assert_close, by_hand, make_case, put, random_b
from tests.lori.sanitized import PROGRAMS, SOURCES, compile_kernel, compile_portable, run_program, sets_with

ROOT = Path(__file__).parents[3]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("code", "sizes", "popularity", "num_terms"),
    all_pairs([*product(native.instruction_sets(), DTYPES)], SIZES, [*POPULARITY], [1, 2, 4]),
)
def test_every_instruction_set_is_within_one_rounding_of_the_exact_sum(
    code: tuple[str, torch.dtype], sizes: tuple[int, ...], popularity: str, num_terms: int
) -> None:
    instruction_set, dtype = code
    case = make_case(sizes, dtype, popularity, num_terms)
    exact, magnitude = by_hand(case)
    add_delta(case.y, case.s, case.operands, case.route, instruction_set)
    assert_close(case.y, exact, magnitude)
    case.assert_nothing_else_is_written()


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("sizes", SIZES)
def test_every_instruction_set_is_the_reference_in_fp32(sizes: tuple[int, ...], instruction_set: str) -> None:
    ours, theirs = (make_case(sizes, torch.float32, "uniform", 3) for _ in range(2))
    add_delta(ours.y, ours.s, ours.operands, ours.route, instruction_set)
    reference.add_delta(theirs.y, theirs.s, theirs.operands, theirs.route)
    torch.testing.assert_close(ours.y, theirs.y, rtol=1e-5, atol=1e-5)


def test_this_processor_runs_portable_code_at_least() -> None:
    assert native.instruction_sets()[-1] == "portable"
    with pytest.raises(ValueError, match="does not run mmx"):
        cpu.bind(make_case(SIZES[0], torch.float32, "identical", 1).operands, "mmx")


@pytest.fixture
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_threads_give_the_same_bits(popularity: str, dtype: torch.dtype) -> None:
    sizes = (40, 2, 16, 700, 6)
    many, one = (make_case(sizes, dtype, popularity, 2) for _ in range(2))
    add_delta(many.y, many.s, many.operands, many.route)
    torch.set_num_threads(1)
    add_delta(one.y, one.s, one.operands, one.route)
    assert torch.equal(many.y, one.y)


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("rank", [16, 48, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_one_adapter_have_the_same_bits_alone_and_together(dtype: torch.dtype, rank: int, instruction_set: str) -> None:
    g = torch.Generator().manual_seed(rank)
    operands = Operands(2, rank, 273, dtype, "cpu")
    for slot in range(2):
        put(operands, slot, random_b(273, rank, 0.2, g))
    s, before = torch.randn(9, 1, rank, generator=g).to(dtype), torch.randn(9, 273, generator=g).to(dtype)
    together, alone = before.clone(), before.clone()
    add_delta(together, s, operands, Route.from_terms([Term(0, 9, 0, 0.7), Term(0, 9, 1, -1.3)], 9), instruction_set)
    for token in range(9):
        terms = [Term(0, 1, 0, 0.7), Term(0, 1, 1, -1.3)]
        add_delta(alone[token : token + 1], s[token : token + 1], operands, Route.from_terms(terms, 1), instruction_set)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_in_s_stay_with_their_token(dtype: torch.dtype) -> None:
    operands = Operands(1, 4, 20, dtype, "cpu")
    put(operands, 0, torch.ones(20, 4))
    s = torch.ones(3, 1, 4, dtype=dtype)
    s[0, 0, 1], s[1, 0, 2] = torch.nan, torch.inf
    y = torch.zeros(3, 20, dtype=dtype)
    add_delta(y, s, operands, Route.from_terms([Term(0, 3, 0, 1.0)], 3))
    assert y[0].isnan().all()
    assert y[1].isinf().all()
    assert y[2].eq(4.0).all()


# --- arguments that would read or write outside of the arrays


def wrong_rank(case: Case) -> Case:
    return replace(case, s=case.s[:, :, :-1])


def wrong_outputs(case: Case) -> Case:
    return replace(case, y=case.y[:, :-1])


def wrong_tokens(case: Case) -> Case:
    return replace(case, y=case.y[:-1])


def more_tokens(case: Case) -> Case:
    return replace(case, y=torch.zeros(18, 40), s=torch.zeros(18, 3, 8))


def rows_on_each_other(case: Case) -> Case:
    return replace(case, y=torch.zeros(1, 40).expand(17, 40))


def another_device(case: Case) -> Case:
    return replace(case, s=case.s.to("meta"))


def wrong_bases(case: Case) -> Case:
    return replace(case, s=case.s[:, :1])


def wrong_dtype(case: Case) -> Case:
    return replace(case, s=case.s.double())


def wrong_strides(case: Case) -> Case:
    return replace(case, y=torch.zeros(40, 17).T)


@pytest.mark.parametrize(
    "spoil",
    [
        wrong_rank,
        wrong_outputs,
        wrong_tokens,
        more_tokens,
        rows_on_each_other,
        another_device,
        wrong_bases,
        wrong_dtype,
        wrong_strides,
    ],
)
def test_arrays_of_another_shape_dtype_or_stride_are_refused(spoil: Callable[[Case], Case]) -> None:
    case = make_case((17, 3, 8, 40, 9), torch.float32, "uniform", 2)
    spoiled = spoil(case)
    with pytest.raises(ValueError, match=r"expected \(17, 40\) and \(17, 3 or more, 8\), both torch.float32 on"):
        add_delta(spoiled.y, spoiled.s, spoiled.operands, case.route)


def test_a_slot_out_of_range_is_refused() -> None:
    case = make_case((2, 1, 3, 5, 2), torch.float32, "identical", 1)
    with pytest.raises(ValueError, match="names a slot that the operands do not have"):
        add_delta(case.y, case.s, case.operands, Route.from_terms([Term(0, 2, 2, 1.0)], 2))
    with pytest.raises(ValueError, match="names a slot that the operands do not have"):
        add_delta(case.y, case.s, case.operands, Route.from_terms([Term(0, 2, 2**31 - 1, 1.0)], 2))
    route = Route.from_terms([Term(0, 2, 0, 1.0)], 2)
    route.slots.neg_().sub_(1)
    with pytest.raises(ValueError, match="a slot is negative"):
        add_delta(case.y, case.s, case.operands, route)


def test_a_route_of_several_layers_is_refused() -> None:
    case = make_case((2, 1, 3, 5, 2), torch.float32, "identical", 1)
    route = Route.from_terms([Term(0, 2, 0, (1.0, 2.0))], 2)
    with pytest.raises(ValueError, match=r"expected .* the route of one layer"):
        add_delta(case.y, case.s, case.operands, route)
    twice = case.y.clone()
    add_delta(twice, case.s, case.operands, Route.from_terms([Term(0, 2, 0, 2.0)], 2))
    add_delta(case.y, case.s, case.operands, route.layer_route(1))
    assert torch.equal(case.y, twice)


def test_operands_are_read_from_the_current_pool_after_a_move() -> None:
    operands = Operands(2, 4, 300, torch.float32, "cpu")
    put(operands, 0, torch.ones(300, 4))
    y, s, route = torch.zeros(1, 300), torch.ones(1, 1, 4), Route.from_terms([Term(0, 1, 0, 1.0), Term(0, 1, 1, 1.0)], 1)
    add_delta(y, s, operands, route)
    put(operands, 1, torch.ones(300, 4))  # the pool grows, and is another tensor
    add_delta(y, s, operands, route)
    assert y.eq(4.0 + 8.0).all()


WITHOUT_MODULE = """
import sys
sys.modules["_lori_cpu"] = None
import torch
from lori.kernels import Operands, Route, Term, add_delta, default_kernel
from tests.lori.operands import put

assert default_kernel(torch.device("cpu")) == "stacked"
operands, route, s = Operands(2, 3, 5, torch.float32, "cpu"), Route.from_terms([Term(0, 2, 1, 1.0)], 2), torch.ones(2, 1, 3)
put(operands, 1, torch.ones(5, 3))
compiled = torch.compile(lambda y, s: add_delta(y, s, operands, route), fullgraph=True, backend="aot_eager")
for kernel in (add_delta, compiled):
    y = torch.zeros(2, 5)
    kernel(y, s, *() if kernel is compiled else (operands, route))
    assert y.eq(3.0).all()
try:
    add_delta(y, s, operands, route, kernel="cpu")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_the_compiled_module_only_its_kernel_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_MODULE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the CPU kernel was not built at install" in done.stdout


# --- the sanitizers


@pytest.mark.sanitizer
@pytest.mark.needs("compiler")
@pytest.mark.parametrize("instruction_set", sets_with("expand"))
def test_steps_read_and_write_nothing_but_their_arrays(tmp_path: Path, instruction_set: str) -> None:
    expand = compile_kernel("expand", "choose", instruction_set)
    rest = compile_portable(SOURCES / "pack.cpp"), compile_portable(PROGRAMS / "sanitize.cpp")
    assert run_program(tmp_path, expand, *rest).startswith("checked ")


@pytest.mark.sanitizer
@pytest.mark.needs("compiler")
def test_files_are_not_read_beyond_their_end(tmp_path: Path) -> None:
    sources = [*(SOURCES / name for name in ("pack.cpp", "rice.cpp", "adapter_file.cpp")), PROGRAMS / "sanitize_files.cpp"]
    assert run_program(tmp_path, *map(compile_portable, sources)).startswith("checked ")
