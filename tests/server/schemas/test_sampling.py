"""Conversion of bodies to the engine's sampling parameters: each can be sent, and has the meaning of the engine's field."""

from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from server.engine.grammar import Grammar
from server.engine.request import SamplingParams
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.schemas.generation import GenerateBody
from server.schemas.openai import OpenAIBody
from server.schemas.sampling import CONVERTED, SHARED

Body = GenerateBody | OpenAIBody
SHARED_VALUES: dict[str, Any] = {
    "logit_bias": {"5": -1.5},
    "min_tokens": 2,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "temperature": 0.7,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "seed": 7,
    "stop": ["a", "b"],
    "grammar": {"type": "json_object"},
    "ignore_eos": True,
    "n": 4,
}
PARAMS = {
    "logit_bias": ((5, -1.5),),
    "stop": ("a", "b"),
    "grammar": Grammar("json_object", field="grammar"),
    "num_choices": 4,
    "num_logprobs": 3,
    "include_stop": True,
    "echo": True,
}
"""Values of the parameters that bodies express in another form, or that only some bodies have."""
GENERATE = GenerateBody(prompt="x", logprobs=3, include_stop=True, echo=True, **SHARED_VALUES)
COMPLETION = CompletionBody(prompt="x", logprobs=3, include_stop_str_in_output=True, echo=True, **SHARED_VALUES)
CHAT = ChatBody.model_validate(
    {
        "messages": [{"role": "user", "content": "x"}],
        "logprobs": True,
        "top_logprobs": 3,
        "include_stop_str_in_output": True,
        **SHARED_VALUES,
    }
)


def smallest(kind: type[Body], **values: Any) -> Body:
    prompt = {"messages": [{"role": "user", "content": "x"}]} if kind is ChatBody else {"prompt": "x"}
    return kind.model_validate({**prompt, **values})


@pytest.mark.parametrize(("body", "lacks"), [(GENERATE, set()), (COMPLETION, set()), (CHAT, {"echo"})])
def test_every_parameter_of_the_engine_can_be_sent(body: Body, lacks: set[str]) -> None:
    params = body.to_sampling()
    for parameter in fields(SamplingParams):
        name = parameter.name
        if name not in lacks:
            assert getattr(params, name) == PARAMS.get(name, SHARED_VALUES.get(name))
            assert getattr(params, name) != getattr(SamplingParams(), name)


@pytest.mark.parametrize("kind", [GenerateBody, CompletionBody, ChatBody])
def test_a_field_of_a_parameters_name_has_its_type_and_its_default(kind: type[Body]) -> None:
    """Check the fields that are passed on by name, which no type checker sees."""
    types, wire_types = get_type_hints(SamplingParams), get_type_hints(kind)
    passed_on = [name for name in SHARED if name in kind.model_fields]
    assert {"temperature", "top_k", "ignore_eos"} <= set(passed_on)
    for name in passed_on:
        assert wire_types[name] == types[name]
        if kind is GenerateBody or name != "temperature":  # OpenAI's default temperature is 1
            assert kind.model_fields[name].default == getattr(SamplingParams(), name)
    assert types.keys() >= CONVERTED


@pytest.mark.parametrize("kind", [GenerateBody, CompletionBody, ChatBody])
def test_seeds_are_random_unless_they_are_given(kind: type[Body]) -> None:
    assert len({smallest(kind).to_sampling().seed for _ in range(20)}) > 15
    assert smallest(kind, seed=0).to_sampling().seed == 0


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_a_negative_seed_is_read_as_64_bits(kind: type[Body]) -> None:
    assert smallest(kind, seed=-1).to_sampling().seed == 2**64 - 1


@pytest.mark.parametrize("kind", [GenerateBody, CompletionBody, ChatBody])
def test_top_k_of_minus_one_keeps_all_tokens(kind: type[Body]) -> None:
    assert smallest(kind, top_k=-1).to_sampling().top_k == 0


def test_a_response_format_is_a_grammar() -> None:
    grammar = smallest(ChatBody, response_format={"type": "json_object"}).to_sampling().grammar
    assert grammar == Grammar("json_object", field="response_format")


@pytest.mark.parametrize(("values", "expected"), [({}, None), ({"logprobs": True}, 0), ({"logprobs": False}, None)])
def test_a_chat_has_alternatives_only_if_it_names_their_number(values: dict[str, bool], expected: int | None) -> None:
    assert smallest(ChatBody, **values).to_sampling().num_logprobs == expected
