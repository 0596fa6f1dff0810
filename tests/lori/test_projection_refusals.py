"""Operands, routes and sizes that a product refuses before it writes anything."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from lori.errors import ModelError
from lori.kernels import Operands, Route, Term
from lori.kernels.cpu import bound_operands, bound_route
from lori.native import MODULE
from lori.projection import NativeProjection, project
from tests.lori.operands import put
from tests.lori.projected import BF16, BOTH, NUM_SLOTS, Case, Framed, Make, bound, make_case, needs_native, tokens


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


@pytest.mark.parametrize(("num_inputs", "dtype"), [(16, torch.float32), (15, BF16)])
def test_layers_without_int8_products_are_refused(num_inputs: int, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=f"int8 of {num_inputs} inputs in {dtype}"):
        project([nn.Linear(num_inputs, 4, dtype=dtype)], quantization="int8")
