"""Layers on one input as one product, in torch and in C++, against a sum in fp64."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lori.kernels import Route, Term
from lori.projection import NativeProjection, TorchProjection, has_native, joint_bias, project, quantize
from tests.lori.operands import put
from tests.lori.projected import BF16, BOTH, CPU, EMPTY, SIZES, Make, assert_within, make_case, needs_native, terms_of, tokens

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
