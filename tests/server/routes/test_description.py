"""The API describes itself: what it says of POST /generate is there, and true."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.schemas.generation import GenerateBody
from tests.server.live import Live

Schema = dict[str, Any]


@pytest.fixture(scope="module")
def description(live: Live) -> Schema:
    found: Schema = live.client.get("/openapi.json").json()
    return found


def schema_of(description: Schema, name: str) -> Schema:
    found: Schema = description["components"]["schemas"][name]
    return found


def operation(description: Schema, path: str = "/generate") -> Schema:
    found: Schema = description["paths"][path]["post"]
    return found


def test_it_names_the_body_the_reply_the_stream_and_refusals(description: Schema) -> None:
    generate = operation(description)
    assert generate["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/GenerateBody"}
    content = generate["responses"]["200"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/GenerateReply"}
    assert "token" in json.dumps(content["text/event-stream"])
    for status in ("400", "404", "413", "429", "500", "503", "504"):
        refusal = generate["responses"][status]
        assert refusal["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorReply"}
        assert refusal["description"]


@pytest.mark.parametrize("name", ["GenerateBody", "WeightedAdapter"])
def test_every_field_of_the_body_is_described(description: Schema, name: str) -> None:
    schema = schema_of(description, name)
    assert schema["additionalProperties"] is False
    assert [field for field, of in schema["properties"].items() if len(of.get("description", "")) < 15] == []


def test_the_body_has_all_fields_and_none_is_required(description: Schema) -> None:
    schema = schema_of(description, "GenerateBody")
    assert set(schema["properties"]) == set(GenerateBody.model_fields)
    assert "required" not in schema, "a prompt or messages: which one is not for a schema to say"


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("adapter", "several of them"),
        ("merge", "the exact sum"),
        ("cached_tokens", "not computed again"),
        ("queue_s", "first step"),
        ("policy", "The operator adds it"),
        ("choices", "more than one"),
    ],
)
def test_what_is_written_beside_a_field_is_said(description: Schema, field: str, said: str) -> None:
    found = [
        of["properties"][field].get("description", "")
        for name, of in description["components"]["schemas"].items()
        if name in ("GenerateBody", "GenerateReply", "Usage", "TimingsReply", "ResolvedAdapter") and field in of["properties"]
    ]
    assert any(said in description for description in found), found


def test_defaults_are_those_that_hold(description: Schema) -> None:
    properties = schema_of(description, "GenerateBody")["properties"]
    assert {name: of.get("default") for name, of in properties.items()} == {
        name: field.default for name, field in GenerateBody.model_fields.items()
    }


def test_a_value_has_one_form(description: Schema) -> None:
    """An empty list is one of names: `oneOf` allows no two."""
    forms = schema_of(description, "GenerateBody")["properties"]["adapter"]["anyOf"][0]["oneOf"]
    assert [of["type"] for of in forms] == ["string", "array", "array"]
    assert [of.get("minItems", 0) for of in forms] == [0, 0, 1]


def examples(schema: Schema) -> Iterator[Schema]:
    yield from schema.get("examples", ())


def test_there_is_an_example_of_each_form(description: Schema) -> None:
    found = [*examples(schema_of(description, "GenerateBody"))]
    assert any("messages" in example for example in found)
    assert any(isinstance(example.get("adapter"), str) for example in found)
    assert any(isinstance(example.get("adapter"), list) and isinstance(example["adapter"][0], dict) for example in found)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_every_example_is_answered(live: Live, description: Schema, path: str) -> None:
    """But for those of POST /detokenize, whose tokens are the embedded model's."""
    reference = operation(description, path)["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    found = [*examples(schema_of(description, reference.rpartition("/")[2]))]
    assert found
    for example in found:
        reply = live.client.post(path, json=example)
        assert reply.status_code == 200, (example, reply.text)


def test_a_reply_has_what_its_schema_says(live: Live, description: Schema) -> None:
    reply = live.generate(prompt="x", adapter=["math", "safety"], merge="ties", n=2, max_tokens=2, logprobs=1)

    def check(value: Any, schema: Schema) -> None:
        if "$ref" in schema:
            check(value, schema_of(description, schema["$ref"].rpartition("/")[2]))
        elif "anyOf" in schema:
            forms = [of for of in schema["anyOf"] if (of.get("type") == "null") == (value is None)]
            assert forms
            check(value, forms[0])
        elif schema.get("type") == "object" and "properties" in schema:
            assert set(value) == set(schema["properties"])
            for field, of in schema["properties"].items():
                check(value[field], of)
        elif schema.get("type") == "array":
            for one in value:
                check(one, schema["items"])
        elif "type" in schema:
            kinds = {"string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None), "object": dict}
            assert isinstance(value, kinds[schema["type"]])

    check(reply, schema_of(description, "GenerateReply"))
