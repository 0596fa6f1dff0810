"""Operands and steps for the kernels' tests.

Shapes: T tokens, A bases, R rank, D outputs, S slots.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from lori.kernels import Operands, Route, Term
from lori.sparse import SparseB

Popularity = Callable[[random.Random, int, int], Sequence[int]]
"""Function from a random source, the number of slots and the number of terms to the slots of one span's terms."""

POPULARITY: dict[str, Popularity] = {
    "identical": lambda _rng, _slots, terms: [0] * terms,
    "distinct": lambda rng, slots, terms: rng.sample(range(slots), min(terms, slots)),
    "uniform": lambda rng, slots, terms: [rng.randrange(slots) for _ in range(terms)],
    "zipf": lambda rng, slots, terms: rng.choices(range(slots), [1 / (slot + 1) for slot in range(slots)], k=terms),
    "none on some": lambda rng, slots, terms: [rng.randrange(slots) for _ in range(terms)] if rng.random() < 0.5 else [],
    "last only": lambda _rng, slots, terms: [slots - 1] * terms,
}
SIZES = [
    (1, 1, 1, 1, 1), (2, 1, 3, 5, 2), (7, 2, 5, 33, 6), (17, 3, 8, 40, 9), (33, 1, 32, 129, 16), (3, 2, 33, 300, 4),
    (5, 1, 64, 255, 5), (4, 1, 100, 273, 3), (3, 1, 17, 1000, 3), (2, 2, 300, 70, 2), (40, 1, 16, 256, 3),
]  # fmt: skip
"""T, A, R, D, S."""
DENSITIES = (0.1, 0.4, 1.0, 0.0)
"""Densities of the slots' B, repeated in this order: sparse, half full, dense as LoRI-D's, empty."""


def sparse(dense: torch.Tensor) -> SparseB:
    """Return the nonzero entries of `dense` (D, R) as a sparse B."""
    return SparseB.from_dense(dense, dense != 0)


def put(operands: Operands, slot: int, dense: torch.Tensor, basis: int = 0) -> None:
    """Pack a dense B (D, R) and put it into a slot."""
    operands.put(slot, operands.pack(sparse(dense)), basis)


def random_b(num_outputs: int, rank: int, density: float, g: torch.Generator) -> torch.Tensor:
    """Return a dense B (D, R) of which about the fraction `density` is nonzero. The rows differ widely in their fractions."""
    share = density if density in (0.0, 1.0) else density * 2 * torch.rand(num_outputs, 1, generator=g)
    return torch.randn(num_outputs, rank, generator=g) * (torch.rand(num_outputs, rank, generator=g) < share)


def strided(rows: int, columns: int, like: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a buffer of NaN and a view (rows, columns) of random numbers inside it."""
    buffer = torch.full((rows + 2, columns + 5), torch.nan, dtype=like.dtype, device=like.device)
    view = buffer[1:-1, 3:-2]
    view.copy_(torch.randn(rows, columns, generator=g))
    return buffer, view


def spans(num_tokens: int, rng: random.Random) -> list[tuple[int, int]]:
    """Divide the tokens of a step into spans, as requests do."""
    cuts = sorted({0, num_tokens, *(rng.randrange(num_tokens + 1) for _ in range(num_tokens // 2))})
    return list(pairwise(cuts))


@dataclass(frozen=True)
class Case:
    """Inputs of one step. `y` and `s` are strided views of buffers that are NaN elsewhere. `b` has the B (D, r) of each slot."""

    buffer: torch.Tensor
    y: torch.Tensor
    s: torch.Tensor
    operands: Operands
    b: Sequence[torch.Tensor]
    terms: tuple[Term, ...]

    @cached_property
    def route(self) -> Route:
        """The route of the step."""
        return Route.from_terms(self.terms, len(self.y), self.y.device)

    def assert_nothing_else_is_written(self) -> None:
        """Assert that the buffer is still NaN outside of y."""
        outside = torch.ones_like(self.buffer, dtype=torch.bool)
        outside[1:-1, 3:-2] = False
        assert self.buffer[outside].isnan().all()


def make_case(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    popularity: str,
    num_terms: int,
    device: str = "cpu",
    densities: Sequence[float] = DENSITIES,
) -> Case:
    """Return a step of `sizes` (T, A, R, D, S). Equal arguments give equal steps."""
    num_tokens, num_bases, rank, num_outputs, num_slots = sizes
    rng, g = random.Random(f"{sizes}{popularity}{num_terms}"), torch.Generator().manual_seed(sum(sizes) + num_terms)
    operands = Operands(num_slots, rank, num_outputs, dtype, device)
    b = [random_b(num_outputs, rng.randint(1, rank), densities[slot % len(densities)], g) for slot in range(num_slots)]
    for slot in rng.sample(range(num_slots), num_slots):
        put(operands, slot, b[slot], rng.randrange(num_bases))
    like = torch.empty(0, dtype=dtype, device=device)
    buffer, y = strided(num_tokens, num_outputs, like, g)
    _, s = strided(num_tokens, num_bases * rank, like, g)
    terms = [
        Term(start, stop, slot, rng.uniform(-2.0, 2.0))
        for start, stop in spans(num_tokens, rng)
        for slot in POPULARITY[popularity](rng, num_slots, num_terms)
    ]
    return Case(buffer, y, s.unflatten(1, (num_bases, rank)), operands, b, tuple(terms))


def by_hand(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exact result in fp64, and for each entry the sum of the magnitudes of its terms."""
    exact, magnitude = case.y.double(), case.y.double().abs()
    for term in case.terms:
        b = term.weight * case.b[term.slot].to(case.y).double().T  # (r, D)
        s = case.s[term.start : term.stop, int(case.operands.basis_of[term.slot]), : len(b)].double()
        exact[term.start : term.stop] += s @ b
        magnitude[term.start : term.stop] += s.abs() @ b.abs()
    return exact, magnitude


ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
"""Maximum relative error of rounding once to a dtype. fp32 has a bound of its own."""


def assert_close(got: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, num_rounded: int = 0) -> None:
    """Assert that `got` is the fp32 sum rounded once, after `num_rounded` operands were rounded to `got`'s dtype."""
    rounding = ROUNDING[got.dtype]
    allowed = rounding * exact.abs() + (num_rounded * rounding + 1e-5) * magnitude
    excess = (got.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"off by {excess.max().item()} more than allowed"  # NaN fails too
