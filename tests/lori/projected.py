"""Layers on one input with adapters, their product in fp64, and the arrays of a call.

In bf16, W x + b is rounded once, A x is rounded once, and y is rounded again after the deltas are added; sums are fp32. So y may
be off by 2**-8 of each of these three, and for the sums by 1e-5 of the magnitudes of their terms: see `Case.expected`.
Shapes: T tokens, N inputs, D outputs of a layer, A bases, R rank, S slots.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from lori.kernels import Operands, Term
from lori.projection import NativeProjection, Projection, TorchProjection
from tests.lori.operands import put, random_b

BF16, CPU = torch.bfloat16, torch.device("cpu")
ROUNDING, SUMMING = {torch.float32: 0.0, BF16: 2.0**-8}, 1e-5
needs_native = pytest.mark.needs("kernels")
Make = Callable[[Sequence[nn.Linear], Sequence[Sequence[torch.Tensor]], Sequence[Operands]], Projection]
BOTH = [pytest.param(TorchProjection, id="torch"), pytest.param(NativeProjection, id="native", marks=needs_native)]

SIZES = [
    ((1,), 2, 1, 1), ((16, 48), 16, 1, 16), ((33, 5, 100), 22, 2, 5), ((49, 47), 64, 3, 33), ((64, 32, 32), 48, 2, 8),
    ((145, 31, 17), 130, 1, 23), ((97, 2), 4094, 1, 4), ((50,), 4096, 2, 7), ((20, 97), 4098, 2, 7), ((65, 3), 9000, 1, 30),
    ((576, 192, 192), 576, 2, 64),
]  # fmt: skip
"""D of each layer, N, A, R. The products divide inputs into pieces of 4096, and outputs into panels of 48 and vectors of 16."""
NUM_SLOTS, EMPTY = 5, 3


@dataclass(frozen=True)
class Case:
    """Layers, every second of which has a bias, and the B of each slot in each layer. Slot `EMPTY` has no entries."""

    linears: Sequence[nn.Linear]
    blocks: Sequence[Sequence[torch.Tensor]]
    operands: Sequence[Operands]
    b: Sequence[Sequence[torch.Tensor]]

    def product(self, make: Make) -> Projection:
        """Return the product of the layers with their adapters."""
        return make(self.linears, self.blocks, self.operands)

    def expected(self, x: torch.Tensor, terms: Sequence[Term] = ()) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (T, sum of D) in fp64 for x (T, N), and the maximum error of each entry."""
        per_layer = [self._of_layer(i, x, terms) for i in range(len(self.linears))]
        exact, allowed = (torch.cat(parts, 1) for parts in zip(*per_layer, strict=True))
        return exact, allowed

    def _of_layer(self, layer: int, x: torch.Tensor, terms: Sequence[Term]) -> tuple[torch.Tensor, torch.Tensor]:
        linear, operands, wide = self.linears[layer], self.operands[layer], x.double()
        rounding, weight = ROUNDING[x.dtype], linear.weight.double()
        exact, magnitude = wide @ weight.T, wide.abs() @ weight.abs().T
        if linear.bias is not None:
            exact, magnitude = exact + linear.bias.double(), magnitude + linear.bias.double().abs()
        off = rounding * exact.abs() + SUMMING * magnitude + 2.0**-126
        again = torch.zeros(len(x), 1, dtype=torch.float64)  # (T, 1) relative error of a token's second rounding
        for term in terms:
            b = term.weight * self.b[layer][term.slot].to(x.dtype).double()  # (D, r)
            a = self.blocks[layer][int(operands.basis_of[term.slot])].to(x.dtype).double()[: b.shape[1]]
            tokens = wide[term.start : term.stop]
            s = tokens @ a.T
            exact[term.start : term.stop] += s @ b.T
            off_s = rounding * s.abs() + SUMMING * (tokens.abs() @ a.abs().T)
            off[term.start : term.stop] += (off_s + SUMMING * s.abs()) @ b.abs().T
            again[term.start : term.stop] = rounding
        return exact, off + again * (exact.abs() + off)


def make_case(sizes: tuple[Any, ...], dtype: torch.dtype = BF16, density: float = 0.3, has_bias: bool = True) -> Case:
    """Return a case of `sizes`. Equal arguments give equal cases."""
    outputs, num_inputs, num_bases, rank = sizes
    rng, g = random.Random(str(sizes)), torch.Generator().manual_seed(sum(outputs) + num_inputs)
    case = Case([], [], [], [])
    for layer, num_outputs in enumerate(outputs):
        linear = nn.Linear(num_inputs, num_outputs, bias=has_bias and layer % 2 == 0, dtype=dtype).requires_grad_(False)
        linear.weight.copy_(torch.randn(num_outputs, num_inputs, generator=g))
        if linear.bias is not None:
            linear.bias.copy_(10 * torch.randn(num_outputs, generator=g))
        operands = Operands(NUM_SLOTS, rank, num_outputs, dtype, "cpu")
        b = [random_b(num_outputs, rng.randint(1, rank), density * (slot != EMPTY), g) for slot in range(NUM_SLOTS)]
        for slot in range(NUM_SLOTS):
            put(operands, slot, b[slot], rng.randrange(num_bases) if layer == 0 else int(case.operands[0].basis_of[slot]))
        case.linears.append(linear)
        case.blocks.append([torch.randn(rank, num_inputs, generator=g) / num_inputs**0.5 for _ in range(num_bases)])
        case.operands.append(operands)
        case.b.append(b)
    return case


def terms_of(num_tokens: int) -> tuple[Term, ...]:
    """Return terms that overlap, leave some tokens without terms, and use every slot."""
    third = -(-num_tokens // 3)
    terms = [Term(0, third, 0, 1.5), Term(0, num_tokens, EMPTY, 2.0), Term(third // 2, third, 1, -0.5), Term(0, 1, 2, 0.25)]
    if num_tokens > third + 1:
        terms += [Term(third + 1, num_tokens, 4, 0.75), Term(third + 1, third + 2, 0, -1.0)]
    return tuple(term for term in terms if term.start < term.stop)


def tokens(num_tokens: int, num_inputs: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    """Return x (T, N), whose tokens differ in magnitude."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(num_tokens, num_inputs, generator=g) * torch.logspace(-2, 1, num_tokens)[:, None]).to(dtype)


def assert_within(got: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    exact, allowed = expected
    assert got.shape == exact.shape
    excess = (got.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"off by {excess.max().item()} more than allowed"  # NaN fails too


@dataclass(frozen=True)
class Framed:
    """Arrays x, y and s of a call of the module, each a view of a buffer that is NaN elsewhere. y and s are 7 before the call."""

    x: torch.Tensor
    y: torch.Tensor
    s: torch.Tensor
    buffers: Sequence[torch.Tensor]

    @classmethod
    def of(cls, case: Case, x: torch.Tensor) -> "Framed":
        """Return the arrays of a call with x (T, N)."""
        widths = (x.shape[1], *(sum(sizes) for sizes in sizes_of(case)))
        buffers = [torch.full((len(x) + 2, width + 5), torch.nan, dtype=BF16) for width in widths]
        views = [buffer[1:-1, 3:-2] for buffer in buffers]
        views[0].copy_(x)
        views[1].fill_(7.0)
        views[2].fill_(7.0)
        return cls(*views, buffers)

    @property
    def places(self) -> tuple[int, ...]:
        """First arguments of `project`."""
        x, y, s = self.x, self.y, self.s
        return x.data_ptr(), x.stride(0), len(x), y.data_ptr(), y.stride(0), s.data_ptr(), s.stride(0)

    def assert_the_rest_is_untouched(self) -> None:
        """Assert that the buffers are still NaN around the views."""
        for buffer in self.buffers:
            around = torch.ones_like(buffer, dtype=torch.bool)
            around[1:-1, 3:-2] = False
            assert buffer[around].isnan().all()


def sizes_of(case: Case) -> tuple[list[int], list[int]]:
    """Return each layer's number of outputs, and the rows of its A's."""
    return [linear.out_features for linear in case.linears], [sum(map(len, blocks)) for blocks in case.blocks]


def bound(case: Case) -> Any:
    """Return the compiled module's projection object."""
    return NativeProjection(case.linears, case.blocks, case.operands).bound
