"""`add_delta`: every kernel against a sum in fp64 written term by term.

Shapes: T tokens, A bases, R rank, D outputs, S slots.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from lori.kernels import KERNELS, Operands, Route, Term, add_delta

Popularity = Callable[[random.Random, int, int], Sequence[int]]
"""Chooses the slots of one span's terms: from a random source, the number of slots and the number of terms."""

POPULARITY: dict[str, Popularity] = {
    "identical": lambda _rng, _slots, terms: [0] * terms,
    "distinct": lambda rng, slots, terms: rng.sample(range(slots), min(terms, slots)),
    "uniform": lambda rng, slots, terms: [rng.randrange(slots) for _ in range(terms)],
    "zipf": lambda rng, slots, terms: rng.choices(range(slots), [1 / (slot + 1) for slot in range(slots)], k=terms),
    "none on some": lambda rng, slots, terms: [rng.randrange(slots) for _ in range(terms)] if rng.random() < 0.5 else [],
    "last only": lambda _rng, slots, terms: [slots - 1] * terms,
}
SIZES = [(1, 1, 1, 1, 1), (2, 1, 3, 5, 2), (7, 2, 5, 33, 6), (17, 3, 8, 40, 9), (33, 1, 32, 129, 16)]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
"""The largest relative error of rounding once to a dtype; fp32 has its own bound."""
ROUNDED_OPERANDS = {"reference": 0, "stacked": 1}
"""How often a kernel rounds an operand to y's dtype before the fp32 sum: `stacked` does with weight * s."""


@dataclass(frozen=True)
class Case:
    """One step's inputs. `y` and `s` are strided views in buffers that are NaN elsewhere."""

    buffer: torch.Tensor
    y: torch.Tensor
    s: torch.Tensor
    operands: Operands
    terms: tuple[Term, ...]

    @property
    def route(self) -> Route:
        return Route.of(self.terms, len(self.y))


def nan_buffer(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a buffer of NaN and a view (rows, columns) in its midst."""
    buffer = torch.full((rows + 2, columns + 5), torch.nan, dtype=dtype)
    return buffer, buffer[1:-1, 3:-2]


def spans(num_tokens: int, rng: random.Random) -> list[tuple[int, int]]:
    """Cuts the tokens of a step in runs, as requests do."""
    cuts = sorted({0, num_tokens, *(rng.randrange(num_tokens + 1) for _ in range(num_tokens // 2))})
    return list(pairwise(cuts))


def make_case(sizes: tuple[int, ...], dtype: torch.dtype, popularity: str, num_terms: int) -> Case:
    num_tokens, num_bases, rank, num_outputs, num_slots = sizes
    rng, g = random.Random(f"{sizes}{popularity}{num_terms}"), torch.Generator().manual_seed(sum(sizes) + num_terms)
    operands = Operands(num_slots, rank, num_outputs, dtype, "cpu")
    for slot in range(num_slots):
        own_rank = rng.randint(1, rank)
        b = torch.randn(num_outputs, own_rank, generator=g) * (torch.rand(num_outputs, own_rank, generator=g) < 0.4)
        operands.put(slot, b, rng.randrange(num_bases))
    buffer, y = nan_buffer(num_tokens, num_outputs, dtype)
    y.copy_(torch.randn(num_tokens, num_outputs, generator=g))
    _, s = nan_buffer(num_tokens, num_bases * rank, dtype)
    s.copy_(torch.randn(num_tokens, num_bases * rank, generator=g))
    terms = [
        Term(start, stop, slot, rng.uniform(-2.0, 2.0))
        for start, stop in spans(num_tokens, rng)
        for slot in POPULARITY[popularity](rng, num_slots, num_terms)
    ]
    return Case(buffer, y, s.unflatten(1, (num_bases, rank)), operands, tuple(terms))


def by_hand(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the exact result in fp64, and the sum of the magnitudes that make up each entry."""
    exact, magnitude = case.y.double(), case.y.double().abs()
    for term in case.terms:
        b = term.weight * case.operands.pool[term.slot].double()  # (R, D)
        s = case.s[term.start : term.stop, int(case.operands.basis_of[term.slot])].double()
        exact[term.start : term.stop] += s @ b
        magnitude[term.start : term.stop] += s.abs() @ b.abs()
    return exact, magnitude


def assert_close(got: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, kernel: str) -> None:
    rounding = ROUNDING[got.dtype]
    allowed = rounding * exact.abs() + (ROUNDED_OPERANDS[kernel] * rounding + 1e-5) * magnitude
    excess = (got.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"off by {excess.max().item()} more than allowed"  # NaN fails too


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("num_terms", [1, 2, 3, 4])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_kernel_adds_what_the_sum_by_hand_adds(
    sizes: tuple[int, ...], dtype: torch.dtype, popularity: str, num_terms: int, kernel: str
) -> None:
    case = make_case(sizes, dtype, popularity, num_terms)
    exact, magnitude = by_hand(case)
    outside = torch.ones_like(case.buffer, dtype=torch.bool)
    outside[1:-1, 3:-2] = False
    add_delta(case.y, case.s, case.operands, case.route, kernel=kernel)
    assert_close(case.y, exact, magnitude, kernel)
    assert case.buffer[outside].isnan().all()


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("sizes", SIZES)
def test_stacked_is_the_reference_in_fp32(sizes: tuple[int, ...], popularity: str) -> None:
    ours, theirs = (make_case(sizes, torch.float32, popularity, 3) for _ in range(2))
    add_delta(ours.y, ours.s, ours.operands, ours.route, kernel="stacked")
    add_delta(theirs.y, theirs.s, theirs.operands, theirs.route, kernel="reference")
    torch.testing.assert_close(ours.y, theirs.y, rtol=1e-5, atol=1e-5)


def ones(num_tokens: int, rank: int, num_outputs: int, num_slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, Operands]:
    """Returns s of ones and operands whose every B is ones: the delta of a term is its weight times the rank."""
    operands = Operands(num_slots, rank, num_outputs, dtype, "cpu")
    for slot in range(num_slots):
        operands.put(slot, torch.ones(num_outputs, rank), 0)
    return torch.ones(num_tokens, 1, rank, dtype=dtype), operands


@pytest.mark.parametrize("kernel", sorted(KERNELS))
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
    add_delta(y, s, operands, Route.of([Term(0, 2, slot, 1.0) for slot in range(num_slots)], 2), kernel=kernel)
    assert y.eq(after).all()


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_opposite_sign_cancel(dtype: torch.dtype, kernel: str) -> None:
    s, operands = ones(3, 4, 7, 2, dtype)
    y = torch.full((3, 7), 1.5, dtype=dtype)
    add_delta(y, s, operands, Route.of([Term(0, 3, 0, 0.75), Term(0, 3, 1, -0.75)], 3), kernel=kernel)
    assert y.eq(1.5).all()


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_without_terms_keeps_every_bit(dtype: torch.dtype, kernel: str) -> None:
    case = make_case((9, 2, 5, 33, 4), dtype, "uniform", 2)
    terms = [Term(0, 3, 1, 0.5), Term(5, 6, 2, -1.0)]
    before = case.y.clone()
    add_delta(case.y, case.s, case.operands, Route.of(terms, 9), kernel=kernel)
    kept = [3, 4, 6, 7, 8]
    assert torch.equal(case.y[kept], before[kept])
    assert (case.y[[0, 1, 2, 5]] != before[[0, 1, 2, 5]]).any(dim=1).all()


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_route_without_terms_changes_nothing(dtype: torch.dtype, kernel: str) -> None:
    case = make_case((7, 2, 5, 33, 6), dtype, "uniform", 1)
    before = case.y.clone()
    add_delta(case.y, case.s, case.operands, Route.of([], 7), kernel=kernel)
    assert torch.equal(case.y, before)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_s_and_operands_are_not_changed(kernel: str) -> None:
    case, same = (make_case((7, 2, 5, 33, 6), torch.float32, "uniform", 3) for _ in range(2))
    add_delta(case.y, case.s, case.operands, case.route, kernel=kernel)
    assert torch.equal(case.s, same.s)
    assert torch.equal(case.operands.pool, same.operands.pool)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_each_slot_reads_its_own_basis(kernel: str) -> None:
    operands = Operands(2, 3, 4, torch.float32, "cpu")
    operands.put(0, torch.ones(4, 3), 1)
    operands.put(1, torch.ones(4, 3), 0)
    s = torch.tensor([[[1.0, 1.0, 1.0], [10.0, 10.0, 10.0]]])  # (1, 2, 3)
    y = torch.zeros(1, 4)
    add_delta(y, s, operands, Route.of([Term(0, 1, 0, 1.0), Term(0, 1, 1, 2.0)], 1), kernel=kernel)
    assert y.tolist() == [[36.0] * 4]


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_lower_rank_leaves_the_further_rows_of_s_alone(kernel: str) -> None:
    operands = Operands(1, 5, 4, torch.float32, "cpu")
    operands.put(0, torch.ones(4, 5), 0)
    operands.put(0, torch.ones(4, 2), 0)  # what the slot held before is gone
    s = torch.tensor([[[1.0, 2.0, 100.0, 100.0, 100.0]]])
    y = torch.zeros(1, 4)
    add_delta(y, s, operands, Route.of([Term(0, 1, 0, 1.0)], 1), kernel=kernel)
    assert y.tolist() == [[3.0] * 4]


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_cleared_slot_adds_nothing(kernel: str) -> None:
    s, operands = ones(2, 3, 4, 2, torch.float32)
    operands.clear(0)
    y = torch.zeros(2, 4)
    add_delta(y, s, operands, Route.of([Term(0, 2, 0, 1.0), Term(1, 2, 1, 1.0)], 2), kernel=kernel)
    assert y.tolist() == [[0.0] * 4, [3.0] * 4]


def test_the_default_kernel_is_one_of_them() -> None:
    case, same = (make_case((7, 2, 5, 33, 6), torch.float32, "zipf", 2) for _ in range(2))
    add_delta(case.y, case.s, case.operands, case.route)
    add_delta(same.y, same.s, same.operands, same.route, kernel="stacked")
    assert torch.equal(case.y, same.y)


@pytest.mark.parametrize("kernel", ["triton", "", "Stacked"])
def test_an_unknown_kernel_is_refused_with_the_known_ones(kernel: str) -> None:
    case = make_case((2, 1, 3, 5, 2), torch.float32, "identical", 1)
    before = case.y.clone()
    with pytest.raises(ValueError, match=rf"no kernel '{kernel}', expected one of \['reference', 'stacked'\]"):
        add_delta(case.y, case.s, case.operands, case.route, kernel=kernel)
    assert torch.equal(case.y, before)


# --- routes and operands


def test_a_route_is_its_terms_as_a_matrix() -> None:
    route = Route.of([Term(0, 2, 5, 0.5), Term(1, 4, 2, -1.0)], 5)
    assert route.slots.tolist() == [2, 5]
    assert route.slots.dtype == torch.int64
    assert route.weights.dtype == torch.float32
    assert route.weights.tolist() == [[0.0, 0.5], [-1.0, 0.5], [-1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]


def test_terms_of_one_slot_on_one_token_add() -> None:
    route = Route.of([Term(0, 2, 3, 0.5), Term(1, 3, 3, 0.25)], 3)
    assert route.slots.tolist() == [3]
    assert route.weights.tolist() == [[0.5], [0.75], [0.25]]


def test_a_route_takes_its_terms_from_a_generator() -> None:
    route = Route.of((Term(0, 1, slot, 1.0) for slot in (1, 0)), 1)
    assert [term.slot for term in route.terms] == [1, 0]
    assert route.weights.tolist() == [[1.0, 1.0]]


def test_operands_start_at_zero_and_hold_what_is_put_transposed() -> None:
    operands = Operands(3, 4, 5, torch.bfloat16, "cpu")
    assert not operands.pool.any()
    b = torch.arange(10.0).view(5, 2)
    operands.put(1, b, 2)
    assert operands.pool.dtype == torch.bfloat16
    assert torch.equal(operands.pool[1, :2], b.T.bfloat16())
    assert not operands.pool[1, 2:].any()
    assert not operands.pool[[0, 2]].any()
    assert operands.basis_of.tolist() == [0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_num_bytes_of_operands_is_what_their_tensors_hold(dtype: torch.dtype) -> None:
    operands = Operands(3, 5, 7, dtype, "cpu")
    held = [value for value in vars(operands).values() if isinstance(value, torch.Tensor)]
    assert operands.num_bytes == sum(tensor.untyped_storage().nbytes() for tensor in held)
