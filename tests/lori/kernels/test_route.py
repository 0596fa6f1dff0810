"""Routes: the segments of a step's tokens that have the same terms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lori.kernels import Route, Term

TERM = st.tuples(st.integers(0, 11), st.integers(1, 12), st.integers(0, 4), st.integers(-3, 3)).filter(lambda t: t[0] < t[1])


@pytest.mark.slow
@given(st.lists(TERM, max_size=12))
def test_each_token_gets_its_terms_once_a_slot(drawn: list[tuple[int, int, int, int]]) -> None:
    terms = [Term(start, stop, slot, weight / 4) for start, stop, slot, weight in drawn]
    expected = torch.zeros(12, 5)
    for term in terms:
        expected[term.start : term.stop, term.slot] += term.weight
    route, got = Route.from_terms(terms, 12), torch.zeros(12, 5)
    last = 0
    for start, stop, added in route.spans:
        assert last <= start < stop
        assert added
        assert len({slot for slot, _ in added}) == len(added)
        last = stop
        for slot, weight in added:
            got[start:stop, slot] += weight
    assert torch.equal(got, expected)
    slots, weights = route.weight_matrix
    assert torch.equal(weights, expected[:, slots])
    assert slots.tolist() == sorted({term.slot for term in terms})


def test_tokens_of_one_request_are_one_segment() -> None:
    route = Route.from_terms([Term(0, 5, 1, 0.5), Term(0, 5, 0, 1.0), Term(5, 6, 1, 2.0)], 8)
    assert route.segments.tolist() == [[0, 5, 0, 2], [5, 6, 2, 3]]
    assert route.slots.tolist() == [1, 0, 1]
    assert route.weights.tolist() == [0.5, 1.0, 2.0]
    assert (route.segments.dtype, route.slots.dtype, route.weights.dtype) == (torch.int32, torch.int32, torch.float32)


def test_neighbours_with_the_same_terms_are_one_segment() -> None:
    terms = [Term(t, t + 1, slot, 0.5) for t in range(4) for slot in (1, 0)] + [Term(4, 5, 1, 0.5), Term(6, 7, 1, 0.5)]
    route = Route.from_terms(terms, 8)
    assert route.spans == [(0, 4, [(1, 0.5), (0, 0.5)]), (4, 5, [(1, 0.5)]), (6, 7, [(1, 0.5)])]


def test_a_route_takes_its_terms_from_a_generator() -> None:
    route = Route.from_terms((Term(0, 1, slot, 1.0) for slot in (1, 0)), 1)
    assert route.slots.tolist() == [1, 0]


def test_a_route_is_built_without_reading_from_its_device() -> None:
    """A meta tensor has no values, so reading one raises an error."""
    route = Route.from_terms([Term(0, 2, 7, 0.5), Term(3, 4, 1, 1.0)], 5, "meta")
    assert route.segment_list == [(0, 2, 0, 1), (3, 4, 1, 2)]
    same = Route.from_terms([Term(0, 2, 7, 0.5), Term(3, 4, 1, 1.0)], 5)
    assert Route(same.segments, same.slots, same.weights, 5).segment_list == route.segment_list


def test_each_layer_has_its_own_weights() -> None:
    terms = [Term(0, 3, 1, (0.5, 1.0)), Term(0, 3, 0, 2.0), Term(1, 2, 1, 0.25), Term(1, 2, 0, (1.0, -2.0)), Term(4, 6, 2, 3.0)]
    terms += [Term(6, 8, 2, (3.0, 3.0)), Term(8, 9, 2, (3.0, 0.0))]
    route = Route.from_terms(terms, 9)
    layers = [route.layer_route(0), route.layer_route(1)]
    for number, layer in enumerate(layers):
        same = [replace(term, weight=term.weight[number] if isinstance(term.weight, tuple) else term.weight) for term in terms]
        expected = Route.from_terms(same, 9)
        assert layer.num_tokens == 9
        assert _by_token(layer) == _by_token(expected)
        assert torch.equal(layer.weight_matrix[1], expected.weight_matrix[1])
        assert layer.weights.data_ptr() % 16 == 0, "else Triton compiles its kernels again"
        assert layer.gpu is route.gpu
    assert route.layer_route(1) is layers[1], "each is made once"


def _by_token(route: Route) -> dict[int, dict[int, float]]:
    return {token: dict(terms) for start, stop, terms in route.spans for token in range(start, stop)}


def test_a_route_whose_weights_are_the_same_in_all_layers_is_that_of_each() -> None:
    route = Route.from_terms([Term(0, 1, 0, 1.0)], 1)
    assert route.layer_route(2) is route
    empty = Route.from_terms([], 1)
    assert empty.layer_route(0) is empty


def test_a_route_by_token_has_a_segment_for_each() -> None:
    segments = torch.tensor([[0, 1, 0, 2], [1, 2, 2, 2], [2, 3, 2, 3]], dtype=torch.int32)
    route = Route.by_token(segments, torch.tensor([4, 5, 6, 0], dtype=torch.int32), torch.tensor([1.0, 2.0, 3.0, 0.0]))
    assert route.num_tokens == 3
    assert route.is_by_token
    assert route.spans == [(0, 1, [(4, 1.0), (5, 2.0)]), (1, 2, []), (2, 3, [(6, 3.0)])]
    assert not Route.from_terms([Term(0, 1, 0, 1.0)], 1).is_by_token
