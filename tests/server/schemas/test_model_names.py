"""Model names: parsing them, and writing them for adapters and weights."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori.merge_options import MAX_ADAPTERS
from server.engine.request import RequestedWeight
from server.schemas.model_names import ModelWeightsError, NamedModel, model_of, parse_model

BASE = "base"


@pytest.mark.parametrize(
    ("adapters", "weights", "model"),
    [
        (["math"], [1.0], "math"),
        (["math"], [2.0], "math:2"),
        (["safety", "math"], [0.5, 0.5], "safety+math"),
        (["math", "safety"], [1.0, 0.8], "math:1+safety:0.8"),
        (["a", "b", "c"], [1 / 3] * 3, "a+b+c"),
        (["math"], [-0.0000001], "math:-0.0000001"),
        (["math", "safety"], ["auto", "auto"], "math+safety"),
        (["math", "safety"], ["auto", 0.5], "math:auto+safety:0.5"),
    ],
)
def test_a_model_is_named_as_it_is_asked_for(adapters: list[str], weights: list[RequestedWeight], model: str) -> None:
    assert model_of(adapters, weights) == model


def test_a_model_names_as_many_adapters_as_a_list_may() -> None:
    names = [f"a{number}" for number in range(MAX_ADAPTERS + 1)]
    assert parse_model("+".join(names[1:]), BASE).adapters == tuple(names[1:])
    with pytest.raises(ModelWeightsError, match="names more than 64 adapters, expected 64 at most"):
        parse_model("+".join(names), BASE)


@given(st.lists(st.decimals(-16, 16, places=3).map(float) | st.just("auto"), min_size=1, max_size=4))
def test_parsing_a_name_gives_its_adapters_and_weights_back(weights: list[RequestedWeight]) -> None:
    adapters = [f"adapter-{number}" for number in range(len(weights))]
    named = parse_model(model_of(adapters, weights), BASE)
    assert named.adapters == tuple(adapters)
    assert named in (NamedModel(tuple(adapters)), NamedModel(tuple(adapters), tuple(weights)))
    if named.weights is None:
        assert weights in ([1 / len(weights)] * len(weights), ["auto"] * len(weights))
