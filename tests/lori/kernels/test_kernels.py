"""`add_delta`: every kernel against a sum in fp64 written term by term.

Shapes: T tokens, A bases, R rank, D outputs, S slots.
"""

from itertools import product

import pytest
import torch

from lori.kernels import Operands, Route, Term, add_delta, default_kernel
from lori.native import MODULE
from tests.cases import all_pairs
from tests.lori.operands import POPULARITY, SIZES, assert_close, by_hand, make_case, put

ROUNDED_OPERANDS = {"reference": 0, "stacked": 1, "cpu": 0}
"""Number of operands that a kernel rounds to y's dtype before the fp32 sum: `stacked` rounds weight * s."""
ON_CPU = sorted(ROUNDED_OPERANDS)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("code", "sizes", "popularity", "num_terms"), all_pairs([*product(ON_CPU, DTYPES)], SIZES, [*POPULARITY], [1, 2, 3, 4])
)
def test_a_kernel_adds_the_same_as_the_sum_by_hand(
    code: tuple[str, torch.dtype], sizes: tuple[int, ...], popularity: str, num_terms: int
) -> None:
    kernel, dtype = code
    case = make_case(sizes, dtype, popularity, num_terms)
    exact, magnitude = by_hand(case)
    add_delta(case.y, case.s, case.operands, case.route, kernel=kernel)
    assert_close(case.y, exact, magnitude, ROUNDED_OPERANDS[kernel])
    case.assert_nothing_else_is_written()


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("sizes", SIZES)
def test_stacked_is_the_reference_in_fp32(sizes: tuple[int, ...], popularity: str) -> None:
    ours, theirs = (make_case(sizes, torch.float32, popularity, 3) for _ in range(2))
    add_delta(ours.y, ours.s, ours.operands, ours.route, kernel="stacked")
    add_delta(theirs.y, theirs.s, theirs.operands, theirs.route, kernel="reference")
    torch.testing.assert_close(ours.y, theirs.y, rtol=1e-5, atol=1e-5)


def ones(num_tokens: int, rank: int, num_outputs: int, num_slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, Operands]:
    """Return s of ones and operands whose B's are all ones, so the delta of a term is its weight times the rank."""
    operands = Operands(num_slots, rank, num_outputs, dtype, "cpu")
    for slot in range(num_slots):
        put(operands, slot, torch.ones(num_outputs, rank), 0)
    return torch.ones(num_tokens, 1, rank, dtype=dtype), operands


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize(
    ("before", "rank", "num_slots", "after"),
    [
        (256.0, 64, 16, 1280.0),  # a sum in bf16 stops at 256, since 256 + 1 rounds to 256
        (256.0, 1, 4, 260.0),  # so does y if it is rounded after each term
        (-256.0, 257, 1, 1.0),  # a delta of 257 rounds to 256 if it is rounded before it is added
    ],
)
def test_bf16_is_summed_in_fp32_and_rounded_once(before: float, rank: int, num_slots: int, after: float, kernel: str) -> None:
    s, operands = ones(2, rank, 5, num_slots, torch.bfloat16)
    y = torch.full((2, 5), before, dtype=torch.bfloat16)
    add_delta(y, s, operands, Route.from_terms([Term(0, 2, slot, 1.0) for slot in range(num_slots)], 2), kernel=kernel)
    assert y.eq(after).all()


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_opposite_sign_cancel(dtype: torch.dtype, kernel: str) -> None:
    s, operands = ones(3, 4, 7, 2, dtype)
    y = torch.full((3, 7), 1.5, dtype=dtype)
    add_delta(y, s, operands, Route.from_terms([Term(0, 3, 0, 0.75), Term(0, 3, 1, -0.75)], 3), kernel=kernel)
    assert y.eq(1.5).all()


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_without_terms_keeps_every_bit(dtype: torch.dtype, kernel: str) -> None:
    case = make_case((9, 2, 5, 33, 4), dtype, "uniform", 2)
    terms = [Term(0, 3, 1, 0.5), Term(5, 6, 2, -1.0)]
    before = case.y.clone()
    add_delta(case.y, case.s, case.operands, Route.from_terms(terms, 9), kernel=kernel)
    unchanged = [3, 4, 6, 7, 8]
    assert torch.equal(case.y[unchanged], before[unchanged])
    assert (case.y[[0, 1, 2, 5]] != before[[0, 1, 2, 5]]).any(dim=1).all()


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_route_without_terms_changes_nothing(dtype: torch.dtype, kernel: str) -> None:
    case = make_case((7, 2, 5, 33, 6), dtype, "uniform", 1)
    before = case.y.clone()
    add_delta(case.y, case.s, case.operands, Route.from_terms([], 7), kernel=kernel)
    assert torch.equal(case.y, before)


@pytest.mark.parametrize("kernel", ON_CPU)
def test_s_and_operands_are_not_changed(kernel: str) -> None:
    case, same = (make_case((7, 2, 5, 33, 6), torch.float32, "uniform", 3) for _ in range(2))
    add_delta(case.y, case.s, case.operands, case.route, kernel=kernel)
    assert torch.equal(case.s, same.s)
    assert torch.equal(case.operands.pool, same.operands.pool)
    assert torch.equal(case.operands.starts, same.operands.starts)


@pytest.mark.parametrize("kernel", ON_CPU)
def test_each_slot_reads_its_own_basis(kernel: str) -> None:
    operands = Operands(2, 3, 4, torch.float32, "cpu")
    put(operands, 0, torch.ones(4, 3), 1)
    put(operands, 1, torch.ones(4, 3), 0)
    s = torch.tensor([[[1.0, 1.0, 1.0], [10.0, 10.0, 10.0]]])  # (1, 2, 3)
    y = torch.zeros(1, 4)
    add_delta(y, s, operands, Route.from_terms([Term(0, 1, 0, 1.0), Term(0, 1, 1, 2.0)], 1), kernel=kernel)
    assert y.tolist() == [[36.0] * 4]


@pytest.mark.parametrize("kernel", ON_CPU)
def test_a_lower_rank_ignores_the_further_rows_of_s(kernel: str) -> None:
    operands = Operands(1, 5, 4, torch.float32, "cpu")
    put(operands, 0, torch.ones(4, 5), 0)
    put(operands, 0, torch.ones(4, 2), 0)  # replaces the slot's former B
    s = torch.tensor([[[1.0, 2.0, 100.0, 100.0, 100.0]]])
    y = torch.zeros(1, 4)
    add_delta(y, s, operands, Route.from_terms([Term(0, 1, 0, 1.0)], 1), kernel=kernel)
    assert y.tolist() == [[3.0] * 4]


@pytest.mark.parametrize("kernel", ON_CPU)
def test_a_cleared_slot_adds_nothing(kernel: str) -> None:
    s, operands = ones(2, 3, 4, 2, torch.float32)
    operands.clear(0)
    y = torch.zeros(2, 4)
    add_delta(y, s, operands, Route.from_terms([Term(0, 2, 0, 1.0), Term(1, 2, 1, 1.0)], 2), kernel=kernel)
    assert y.tolist() == [[0.0] * 4, [3.0] * 4]


def test_the_default_is_the_compiled_kernel_if_it_is_built() -> None:
    assert MODULE, "the tests need a C++ compiler at install"
    assert default_kernel(torch.device("cpu")) == "cpu"
    case, same = (make_case((7, 2, 5, 33, 6), torch.float32, "zipf", 2) for _ in range(2))
    add_delta(case.y, case.s, case.operands, case.route)
    add_delta(same.y, same.s, same.operands, same.route, kernel="cpu")
    assert torch.equal(case.y, same.y)


@pytest.mark.parametrize("kernel", ["triton", "", "Stacked"])
def test_an_unknown_kernel_is_refused_with_the_known_ones(kernel: str) -> None:
    case = make_case((2, 1, 3, 5, 2), torch.float32, "identical", 1)
    before = case.y.clone()
    with pytest.raises(ValueError, match=rf"no kernel '{kernel}', expected one of \['cpu', 'gpu', 'reference', 'stacked'\]"):
        add_delta(case.y, case.s, case.operands, case.route, kernel=kernel)
    assert torch.equal(case.y, before)
