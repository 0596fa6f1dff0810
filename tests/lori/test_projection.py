"""Layers on one input as one product, in torch and in C++, against a sum in fp64.

In bf16, W x + b is rounded once, A x is rounded once, and y is rounded again after the deltas are added; sums are fp32. So y may
be off by 2**-8 of each of these three, and for the sums by 1e-5 of the magnitudes of their terms: see `Case.expected`.
Shapes: T tokens, N inputs, D outputs of a layer, A bases, R rank, S slots.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import nn

from lori.errors import ModelError
from lori.kernels import Operands, Route, Term
from lori.kernels.cpu import bound_operands, bound_route
from lori.kernels.native import MODULE
from lori.projection import NativeProjection, Projection, TorchProjection, has_native, joint_bias, project, quantize
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


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """Yield a function that sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- results


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 17, 33])
@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_are_within_rounding_of_the_exact_sum(sizes: tuple[Any, ...], num_tokens: int, make: Make) -> None:
    case, x, terms = make_case(sizes), tokens(num_tokens, sizes[1]), terms_of(num_tokens)
    y = case.product(make)(x, Route.from_terms(terms, num_tokens))
    assert y.is_contiguous()
    assert y.dtype is BF16
    assert_within(y, case.expected(x, terms))


@pytest.mark.parametrize("make", BOTH)
def test_every_number_of_tokens_up_to_40(make: Make) -> None:
    case = make_case(((49, 47), 64, 3, 33))
    product = case.product(make)
    for num_tokens in range(1, 41):
        x, terms = tokens(num_tokens, 64), terms_of(num_tokens)
        assert_within(product(x, None), case.expected(x))
        assert_within(product(x, Route.from_terms(terms, num_tokens)), case.expected(x, terms))


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("num_tokens", [255, 256, 257, 300, 513, 600])
@pytest.mark.parametrize("sizes", [((49, 47), 64, 3, 33), ((20, 97), 4098, 2, 7)])
def test_more_tokens_than_one_pass_over_the_weights_takes(sizes: tuple[Any, ...], num_tokens: int, make: Make) -> None:
    case, x, terms = make_case(sizes), tokens(num_tokens, sizes[1]), terms_of(num_tokens)
    product = case.product(make)
    assert_within(product(x, Route.from_terms(terms, num_tokens)), case.expected(x, terms))
    assert_within(product(x, None), case.expected(x))


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("rank", range(1, 65, 3))
def test_every_rank(rank: int, make: Make) -> None:
    sizes = ((33, 17), 32, 2, rank)
    case, x, terms = make_case(sizes, density=0.7), tokens(6, 32), terms_of(6)
    assert_within(case.product(make)(x, Route.from_terms(terms, 6)), case.expected(x, terms))


@pytest.mark.parametrize("num_inputs", [1, 21, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_an_odd_number_of_inputs_is_computed_by_torch(dtype: torch.dtype, num_inputs: int) -> None:
    case, x, terms = make_case(((9, 4, 5), num_inputs, 2, 5), dtype), tokens(7, num_inputs, dtype), terms_of(7)
    product = case.product(project)
    assert isinstance(product, TorchProjection)
    assert_within(product(x, Route.from_terms(terms, 7)), case.expected(x, terms))


@pytest.mark.parametrize("sizes", SIZES)
def test_fp32_is_exact_to_fp32(sizes: tuple[Any, ...]) -> None:
    case, x, terms = make_case(sizes, torch.float32), tokens(9, sizes[1], torch.float32), terms_of(9)
    product = case.product(project)
    assert isinstance(product, TorchProjection)
    assert_within(product(x, Route.from_terms(terms, 9)), case.expected(x, terms))


def test_the_compiled_product_is_used_if_it_supports_the_layers() -> None:
    linears = [nn.Linear(6, 9, dtype=BF16)]
    assert isinstance(project(linears), NativeProjection if has_native(BF16, CPU) else TorchProjection)
    assert not has_native(BF16, torch.device("meta"))
    assert not has_native(torch.float32, CPU)
    assert not has_native(torch.float16, CPU)


@needs_native
@pytest.mark.parametrize("sizes", SIZES)
def test_both_products_agree_within_rounding(sizes: tuple[Any, ...]) -> None:
    case, x, terms = make_case(sizes), tokens(19, sizes[1]), terms_of(19)
    ours, theirs = (case.product(make)(x, Route.from_terms(terms, 19)) for make in (NativeProjection, TorchProjection))
    _, allowed = case.expected(x, terms)
    assert ((ours.double() - theirs.double()).abs() <= 2 * allowed).all()


# --- without a route


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("sizes", SIZES)
def test_without_a_route_the_result_is_the_plain_product(sizes: tuple[Any, ...], make: Make) -> None:
    case, x = make_case(sizes), tokens(5, sizes[1])
    with_adapters, plain = case.product(make), make(case.linears, (), ())
    assert torch.equal(with_adapters(x, None), plain(x, None))
    assert_within(plain(x, None), case.expected(x))


@pytest.mark.parametrize("make", BOTH)
def test_without_a_route_a_is_not_multiplied(make: Make) -> None:
    case = make_case(((33, 5, 100), 22, 2, 5))
    for a in (a for of_layer in case.blocks for a in of_layer):
        a.fill_(torch.nan)
    x, product = tokens(5, 22), case.product(make)
    assert_within(product(x, None), case.expected(x))
    route = Route.from_terms([Term(0, 2, 0, 1.0)], 5)
    assert product(x, route)[:2].isnan().any(1).all()
    assert_within(product(x, route)[2:], case.expected(x[2:]))


@pytest.mark.parametrize("make", BOTH)
def test_a_route_is_for_one_call_only(make: Make) -> None:
    case, x = make_case(((33, 5, 100), 22, 2, 5)), tokens(6, 22)
    product = case.product(make)
    before = product(x, None)
    assert not torch.equal(product(x, Route.from_terms([Term(0, 6, 0, 1.0)], 6)), before)
    assert torch.equal(product(x, None), before)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("terms", [(), (Term(0, 6, EMPTY, 3.0),)])
def test_no_terms_and_empty_slots_add_nothing(terms: Sequence[Term], has_bias: bool, make: Make) -> None:
    case, x = make_case(((33, 5, 100), 22, 2, 5), has_bias=has_bias), tokens(6, 22)
    product = case.product(make)
    assert torch.equal(product(x, Route.from_terms(terms, 6)), product(x, None))
    assert (joint_bias(case.linears) is None) is not has_bias


@pytest.mark.parametrize("make", BOTH)
def test_no_tokens_give_no_outputs(make: Make) -> None:
    case = make_case(((33, 5), 22, 2, 5))
    product = case.product(make)
    assert product(tokens(0, 22), None).shape == (0, 38)
    assert product(tokens(0, 22), Route.from_terms([], 0)).shape == (0, 38)


# --- memory


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("num_tokens", [1, 6, 40])
def test_rows_of_x_may_be_strided(num_tokens: int, make: Make) -> None:
    case, terms = make_case(((33, 5, 100), 22, 2, 5)), terms_of(num_tokens)
    buffer = torch.full((num_tokens + 2, 22 + 5), torch.nan, dtype=BF16)
    x = buffer[1:-1, 3:-2]
    x.copy_(tokens(num_tokens, 22))
    product, route = case.product(make), Route.from_terms(terms, num_tokens)
    assert_within(product(x, route), case.expected(x, terms))
    assert torch.equal(product(x, route), product(x.contiguous(), route))


@pytest.mark.parametrize("make", BOTH)
def test_inputs_weights_and_adapters_are_not_changed(make: Make) -> None:
    case, same = (make_case(((33, 5, 100), 22, 2, 5)) for _ in range(2))
    x = tokens(6, 22)
    case.product(make)(x, Route.from_terms(terms_of(6), 6))
    assert torch.equal(x, tokens(6, 22))
    for ours, theirs, operands, same_operands in zip(case.linears, same.linears, case.operands, same.operands, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(operands.pool, same_operands.pool)
        assert torch.equal(operands.starts, same_operands.starts)


@pytest.mark.parametrize("make", BOTH)
def test_weights_are_copied(make: Make) -> None:
    case, x = make_case(((33, 5), 22, 2, 5)), tokens(6, 22)
    product, expected = case.product(make), case.expected(x)
    for linear in case.linears:
        linear.weight.fill_(torch.nan)
        if linear.bias is not None:
            linear.bias.fill_(torch.nan)
    assert_within(product(x, None), expected)


@pytest.mark.parametrize("make", BOTH)
def test_values_that_are_not_finite_stay_with_their_token(make: Make) -> None:
    case, terms = make_case(((33, 5, 100), 22, 2, 5)), terms_of(9)
    x, clean = tokens(9, 22), tokens(9, 22)
    x[2, 3], x[5, 0] = torch.nan, torch.inf
    y = case.product(make)(x, Route.from_terms(terms, 9))
    assert y[2].isnan().all()
    assert not y[5].isfinite().any()
    others = [0, 1, 3, 4, 6, 7, 8]
    exact, allowed = case.expected(clean, terms)
    assert_within(y[others], (exact[others], allowed[others]))


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


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 9, 40, 300])
@pytest.mark.parametrize("sizes", [SIZES[0], *SIZES[2:6], SIZES[8]])
def test_nothing_is_written_around_the_outputs(sizes: tuple[Any, ...], num_tokens: int, threads: int) -> None:
    case, x, terms = make_case(sizes), tokens(num_tokens, sizes[1]), terms_of(num_tokens)
    module = bound(case)
    plain, whole = (Framed.of(case, x) for _ in range(2))
    module.multiply(*plain.places[:5], threads)
    operands = [bound_operands(layer_operands) for layer_operands in case.operands]
    module.project(*whole.places, operands, bound_route(Route.from_terms(terms, num_tokens)), threads)
    assert_within(plain.y, case.expected(x))
    assert_within(whole.y, case.expected(x, terms))
    a = torch.cat([a for blocks in case.blocks for a in blocks]).to(BF16).double()
    s = x.double() @ a.T
    assert_within(whole.s, (s, ROUNDING[BF16] * s.abs() + SUMMING * (x.double().abs() @ a.abs().T)))
    assert plain.s.eq(7.0).all()
    for framed in (plain, whole):
        framed.assert_the_rest_is_untouched()


# --- threads


@needs_native
@pytest.mark.parametrize("num_tokens", [1, 8, 40, 77, 300, 600])
@pytest.mark.parametrize("sizes", [SIZES[0], *SIZES[2:6], SIZES[8], SIZES[10]])
def test_threads_give_the_same_bits(sizes: tuple[Any, ...], num_tokens: int, num_threads: Callable[[int], None]) -> None:
    case, x = make_case(sizes), tokens(num_tokens, sizes[1])
    product, route = case.product(NativeProjection), Route.from_terms(terms_of(num_tokens), num_tokens)
    plain, with_deltas = product(x, None), product(x, route)
    for threads in (2, 3, 2, 3):
        num_threads(threads)
        assert torch.equal(product(x, None), plain)
        assert torch.equal(product(x, route), with_deltas)


@needs_native
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_token_s_bits_do_not_depend_on_the_others(density: float) -> None:
    case, x = make_case(((49, 47), 4098, 2, 7), density=density), tokens(300, 4098)
    product, terms = case.product(NativeProjection), (Term(0, 300, 0, 1.5), Term(0, 300, 1, -0.5))
    together = product(x, Route.from_terms(terms, 300))
    for t in (0, 7, 8, 151, 255, 256, 299):
        alone = product(x[t : t + 1], Route.from_terms([Term(0, 1, term.slot, term.weight) for term in terms], 1))
        assert torch.equal(alone[0], together[t])


@needs_native
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("sizes", [SIZES[2], SIZES[4], SIZES[10]])
def test_bits_do_not_depend_on_the_number_of_tokens(sizes: tuple[Any, ...], quantization: Literal["none", "int8"]) -> None:
    case, x = make_case(sizes), tokens(250, sizes[1])
    product = project(case.linears, case.blocks, case.operands, quantization)
    for terms in ((), (Term(0, 250, 0, 1.5), Term(0, 250, 1, -0.5))):
        together = product(x, Route.from_terms(terms, 250))
        for count in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 96, 97, 128):
            route = Route.from_terms([Term(0, count, term.slot, term.weight) for term in terms], count)
            assert torch.equal(product(x[:count], route), together[:count])
            assert torch.equal(product(x[-count:], route), together[-count:])


# --- operands that change between steps


@pytest.mark.parametrize("make", BOTH)
def test_adapters_put_and_cleared_between_calls_take_effect(make: Make) -> None:
    case, x, terms = make_case(((600, 33), 22, 2, 5)), tokens(6, 22), (Term(0, 4, 0, 1.0), Term(2, 6, EMPTY, 2.0))
    product, route, g = case.product(make), Route.from_terms(terms, 6), torch.Generator().manual_seed(1)
    assert_within(product(x, route), case.expected(x, terms))
    for layer, operands in enumerate(case.operands):
        before = operands.pool.data_ptr()
        case.b[layer][EMPTY] = torch.randn(operands.layout.num_outputs, 5, generator=g)
        put(operands, EMPTY, case.b[layer][EMPTY], 1)
        assert operands.pool.data_ptr() != before  # the pool grew, and is another tensor
    assert_within(product(x, route), case.expected(x, terms))
    for layer, operands in enumerate(case.operands):
        case.b[layer][0] = torch.zeros(operands.layout.num_outputs, 1)
        operands.clear(0)
    assert_within(product(x, route), case.expected(x, terms))


# --- refusals


def fewer_operands(case: Case) -> list[Operands]:
    return list(case.operands[:-1])


def no_operands(_case: Case) -> list[Operands]:
    return []


def of_another_layer(case: Case) -> list[Operands]:
    return [case.operands[1], case.operands[0]]


def of_another_dtype(case: Case) -> list[Operands]:
    return [case.operands[0], Operands(NUM_SLOTS, 5, 7, torch.float32, "cpu")]


def of_another_rank(case: Case) -> list[Operands]:
    return [case.operands[0], Operands(NUM_SLOTS, 4, 7, BF16, "cpu")]


def fewer_slots(case: Case) -> list[Operands]:
    return [case.operands[0], Operands(2, 5, 7, BF16, "cpu")]


def of_a_further_basis(case: Case) -> list[Operands]:
    put(case.operands[1], 2, torch.ones(7, 5), 2)
    return list(case.operands)


SPOIL = [fewer_operands, no_operands, of_another_layer, of_another_dtype, of_another_rank, fewer_slots, of_a_further_basis]


@needs_native
@pytest.mark.parametrize("spoil", SPOIL)
def test_operands_of_other_layers_are_refused_and_nothing_is_written(
    spoil: Callable[[Case], list[Operands]],
) -> None:
    case = make_case(((33, 7), 22, 2, 5))
    module, framed = bound(case), Framed.of(case, tokens(6, 22))
    operands = spoil(case)
    route = Route.from_terms([Term(0, 6, 2, 1.0)], 6)
    with pytest.raises(ValueError, match=r"operands|basis|slot"):
        module.project(*framed.places, [bound_operands(layer_operands) for layer_operands in operands], bound_route(route), 1)
    assert framed.y.eq(7.0).all()
    assert framed.s.eq(7.0).all()
    with pytest.raises(ValueError, match=r"operands|basis|slot"):
        NativeProjection(case.linears, case.blocks, operands)(tokens(6, 22), route)


@needs_native
@pytest.mark.parametrize("num_tokens", [5, 7])
def test_a_route_of_other_tokens_is_refused_and_nothing_is_written(num_tokens: int) -> None:
    case = make_case(((33, 7), 22, 2, 5))
    module, framed = bound(case), Framed.of(case, tokens(6, 22))
    route = Route.from_terms([Term(0, num_tokens, 0, 1.0)], num_tokens)
    with pytest.raises(ValueError, match="a route of these tokens"):
        module.project(*framed.places, [bound_operands(operands) for operands in case.operands], bound_route(route), 1)
    assert framed.y.eq(7.0).all()
    assert framed.s.eq(7.0).all()


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("num_tokens", [2099, 2101])
def test_a_long_route_of_other_tokens_is_refused(num_tokens: int, make: Make) -> None:
    case = make_case(((576,), 64, 2, 32), density=1.0)
    route = Route.from_terms([Term(0, 2000, 0, 1.0)], num_tokens)
    with pytest.raises(ValueError, match="expected"):
        case.product(make)(tokens(2100, 64), route)


@needs_native
def test_a_negative_slot_is_refused() -> None:
    case, route = make_case(((33, 7), 22, 2, 5)), Route.from_terms([Term(0, 6, 0, 1.0)], 6)
    route.slots.sub_(1)
    with pytest.raises(ValueError, match="a slot is negative"):
        case.product(NativeProjection)(tokens(6, 22), route)


@needs_native
def test_panels_and_biases_of_other_sizes_are_refused() -> None:
    make = partial(torch.zeros, dtype=torch.uint16)
    size = MODULE.part_size(33, 22) + MODULE.part_size(5, 22)
    assert size == 22 * (48 + 16)
    for num_values, num_inputs, bias in ((size - 1, 22, 33), (size + 1, 22, 33), (size, 21, 33), (size, 0, 33), (size, 22, 32)):
        with pytest.raises(ValueError, match=r"expected|sizes"):
            MODULE.Projection(make(num_values).numpy(), [33], [5], num_inputs, torch.zeros(bias).numpy(), None, None, "portable")
    with pytest.raises(ValueError, match="this processor does not run avx1024"):
        MODULE.Projection(make(size).numpy(), [33], [5], 22, torch.zeros(33).numpy(), None, None, "avx1024")
    weight = make(33, 22).numpy()
    for num_values in (22 * 48 - 1, 22 * 48 + 1):
        with pytest.raises(ValueError, match="panels of the weights' size"):
            MODULE.pack_weights(weight, make(num_values).numpy())
    with pytest.raises(ValueError, match="even number"):
        MODULE.pack_weights(make(33, 21).numpy(), make(21 * 48).numpy())


# --- weights in int8


@needs_native
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 17, 300])
@pytest.mark.parametrize("sizes", SIZES)
def test_quantized_weights_give_the_product_of_their_rounded_values(sizes: tuple[Any, ...], num_tokens: int) -> None:
    case, x, terms = make_case(sizes), tokens(num_tokens, sizes[1]), terms_of(num_tokens)
    product = project(case.linears, case.blocks, case.operands, "int8")
    rounded = replace(case, linears=[of_rounded(linear) for linear in case.linears])
    assert_within(product(x, None), rounded.expected(x))
    assert_within(product(x, Route.from_terms(terms, num_tokens)), rounded.expected(x, terms))


def of_rounded(linear: nn.Linear) -> nn.Linear:
    """Return a layer in fp32 with the values of the int8 weights."""
    quantized, scales = quantize(linear.weight)
    wide = deepcopy(linear).float()
    wide.weight.copy_(scales[:, None] * quantized)
    return wide


def test_a_quantized_weight_is_off_by_half_a_step_of_its_output_at_most() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 40)[:, None]
    weight[7] = 0
    quantized, scales = quantize(weight)
    assert quantized.dtype is torch.int8
    assert ((scales[:, None] * quantized - weight).abs() <= 0.5001 * scales[:, None]).all()
    assert (quantized.abs().amax(1) == 127).sum() == 39
    assert (quantized[7] == 0).all()


@pytest.mark.parametrize(("num_inputs", "dtype"), [(16, torch.float32), (15, BF16)])
def test_layers_without_int8_products_are_refused(num_inputs: int, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=f"int8 of {num_inputs} inputs in {dtype}"):
        project([nn.Linear(num_inputs, 4, dtype=dtype)], quantization="int8")
