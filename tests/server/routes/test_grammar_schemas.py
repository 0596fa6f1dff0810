"""Answers under a JSON schema fit it, for random schemas and for a real model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from lori.embedded import embedded_model
from server.engine.generate_request import GenerateRequest
from server.engine.grammar import Grammar
from server.engine.request import SamplingParams
from server.loading import load_service
from server.settings import Settings
from tests.server.rig import Rig, build, rig_of

WARM = SamplingParams(temperature=1.0)


@pytest.fixture(scope="module")
def rig(writer_model: Path) -> Rig:
    """Return one engine for the whole file. It is idle between tests."""
    return build(writer_model, num_blocks=256, max_step_tokens=64)


def integers(low: int, span: int) -> Any:
    return {"type": "integer", "minimum": low, "maximum": low + span}


def arrays(items: Any, least: int, more: int) -> Any:
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}


def objects(properties: dict[str, Any], num_required: int) -> Any:
    required = [*properties][:num_required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=4), st.lists(st.integers(0, 9), max_size=2))
LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": "string", "maxLength": 5}]),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]{2,4}$"}, {"type": "string", "format": "date"}]),
    st.builds(integers, st.integers(-99, 99), st.integers(0, 50)),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
)
NAMES = st.one_of(st.sampled_from(["a", "b c", 'q"', "é", "\\n", ""]), st.text(max_size=3))
SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(arrays, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(objects, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 3)),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=6,
)
"""Schemas whose answers end after few tokens."""


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(SCHEMAS, min_size=1, max_size=4), st.integers(0, 2**31))
def test_an_answer_under_any_schema_fits_it(rig: Rig, schemas: list[Any], seed: int) -> None:
    ask = GenerateRequest(prompt="Say something.", max_tokens=600, sampling=replace(WARM, seed=seed))
    heard = rig.run(
        [replace(ask, sampling=replace(ask.sampling, grammar=Grammar("json_schema", json.dumps(schema)))) for schema in schemas]
    )
    for one, schema in zip(heard, schemas, strict=True):
        assert one.done.finish_reason == "stop"
        Draft202012Validator(schema).validate(json.loads(one.text))


PERSON = objects(
    {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["new", "vip", "late"]}, "maxItems": 3},
        "email": {"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}[.](org|net)$"},
    },
    3,
)
NODE = {"value": {"type": "number", "minimum": 0, "maximum": 10}, "children": arrays({"$ref": "#/$defs/node"}, 0, 1)}
TREE = {"$defs": {"node": objects(NODE, 1)}, "$ref": "#/$defs/node"}
WHY = {"kind": {"const": "yes"}, "why": {"type": "string", "maxLength": 60}}
ANSWER = {"anyOf": [objects(WHY, 2), objects({"kind": {"const": "no"}}, 1)]}
TIMES = arrays({"type": "string", "format": "date-time"}, 1, 1)


@pytest.mark.model
def test_the_embedded_model_s_answers_fit_their_schemas_at_temperature_1() -> None:
    settings = Settings(model=str(embedded_model()), demo_adapters=False, threads=1, kv_cache_gib=0.5, max_batch=32)
    rig = rig_of(load_service(settings))
    schemas = [PERSON, TREE, ANSWER, TIMES, {"type": "string", "maxLength": 40}, {"enum": ["positive", "negative", "neutral"]}]
    prompts = ["Describe a person as JSON.", "Answer in JSON.\n", "Who was Ada Lovelace?"]
    ways = [WARM, SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2)]
    asked = [
        (
            schema,
            GenerateRequest(
                prompt=prompt,
                max_tokens=800,
                sampling=replace(way, seed=seed, grammar=Grammar("json_schema", json.dumps(schema))),
            ),
        )
        for schema in schemas
        for seed, prompt in enumerate(prompts)
        for way in ways
    ]
    heard = rig.run([ask for _, ask in asked])
    for one, (schema, _) in zip(heard, asked, strict=True):
        assert one.done.finish_reason == "stop"
        Draft202012Validator(schema).validate(json.loads(one.text))
    rig.engine.adapter_cache.close()
