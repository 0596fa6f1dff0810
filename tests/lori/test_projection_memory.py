"""Memory and threads of a product: it writes its outputs alone, and a token's bits do not depend on the others."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch

from lori.kernels import Route, Term
from lori.kernels.cpu import bound_operands, bound_route
from lori.projection import NativeProjection, project
from tests.lori.projected import (
    BF16,
    BOTH,
    ROUNDING,
    SIZES,
    SUMMING,
    Framed,
    Make,
    assert_within,
    bound,
    make_case,
    needs_native,
    terms_of,
    tokens,
)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """Yield a function that sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
