"""The API's description of POST /generate: complete and true."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.schemas.generation import GenerateBody
from tests.server.live import Live

Schema = dict[str, Any]


@pytest.fixture(scope="module")
def description(live: Live) -> Schema:
    document: Schema = live.client.get("/openapi.json").json()
    return document


def schema_of(description: Schema, name: str) -> Schema:
    schema: Schema = description["components"]["schemas"][name]
    return schema


def operation(description: Schema, path: str = "/generate") -> Schema:
    post: Schema = description["paths"][path]["post"]
    return post


def test_the_body_the_reply_the_stream_and_the_refusals_are_described(description: Schema) -> None:
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
    assert [field for field, value in schema["properties"].items() if len(value.get("description", "")) < 15] == []


def test_the_body_has_all_fields_and_none_is_required(description: Schema) -> None:
    schema = schema_of(description, "GenerateBody")
    assert set(schema["properties"]) == set(GenerateBody.model_fields)
    assert "required" not in schema, "the schema cannot express that either a prompt or messages are required"


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("adapter", "several of them"),
        ("merge", "the exact sum"),
        ("cached_tokens", "not computed again"),
        ("queue_s", "first step"),
        ("policy", "The operator adds it"),
        ("choices", "more than one"),
    ],
)
def test_the_docstring_of_a_field_is_its_description(description: Schema, field: str, text: str) -> None:
    names = ("GenerateBody", "GenerateReply", "Usage", "TimingsReply", "ResolvedAdapter")
    descriptions = [
        schema["properties"][field].get("description", "")
        for name, schema in description["components"]["schemas"].items()
        if name in names and field in schema["properties"]
    ]
    assert any(text in each for each in descriptions), descriptions


def test_the_described_defaults_are_those_of_the_model(description: Schema) -> None:
    properties = schema_of(description, "GenerateBody")["properties"]
    assert {name: value.get("default") for name, value in properties.items()} == {
        name: field.default for name, field in GenerateBody.model_fields.items()
    }


def test_a_value_matches_only_one_form(description: Schema) -> None:
    """Check that an empty list counts as a list of names: a value must not match two forms of `oneOf`."""
    forms = schema_of(description, "GenerateBody")["properties"]["adapter"]["anyOf"][0]["oneOf"]
    assert [form["type"] for form in forms] == ["string", "array", "array"]
    assert [form.get("minItems", 0) for form in forms] == [0, 0, 1]


def examples(schema: Schema) -> Iterator[Schema]:
    yield from schema.get("examples", ())


def test_there_is_an_example_of_each_form(description: Schema) -> None:
    bodies = [*examples(schema_of(description, "GenerateBody"))]
    assert any("messages" in body for body in bodies)
    assert any(isinstance(body.get("adapter"), str) for body in bodies)
    assert any(isinstance(body.get("adapter"), list) and isinstance(body["adapter"][0], dict) for body in bodies)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_every_example_is_answered(live: Live, description: Schema, path: str) -> None:
    """Send the examples of every route but POST /detokenize, whose examples hold tokens of the embedded model."""
    reference = operation(description, path)["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    bodies = [*examples(schema_of(description, reference.rpartition("/")[2]))]
    assert bodies
    for example in bodies:
        reply = live.client.post(path, json=example)
        assert reply.status_code == 200, (example, reply.text)


def test_a_reply_has_the_fields_and_types_of_its_schema(live: Live, description: Schema) -> None:
    reply = live.generate(prompt="x", adapter=["math", "safety"], merge="ties", n=2, max_tokens=2, logprobs=1)

    def check(value: Any, schema: Schema) -> None:
        if "$ref" in schema:
            check(value, schema_of(description, schema["$ref"].rpartition("/")[2]))
        elif "anyOf" in schema:
            forms = [form for form in schema["anyOf"] if (form.get("type") == "null") == (value is None)]
            assert forms
            check(value, forms[0])
        elif schema.get("type") == "object" and "properties" in schema:
            assert set(schema["properties"]) - {"block_weights"} == set(value)  # only named merges can have these
            for field in value:
                check(value[field], schema["properties"][field])
        elif schema.get("type") == "array":
            for one in value:
                check(one, schema["items"])
        elif "type" in schema:
            kinds = {"string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None), "object": dict}
            assert isinstance(value, kinds[schema["type"]])

    check(reply, schema_of(description, "GenerateReply"))
