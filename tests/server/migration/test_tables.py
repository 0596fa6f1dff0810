"""The tables of other servers' words: the fields, routes and flags that their hints name exist."""

import re
from typing import get_args

import pytest
from transformers import PreTrainedTokenizerFast

from lori.flags import STRAY, flag_of
from server.app import create_app
from server.cluster.settings import ClusterSettings
from server.description.openapi import METHODS
from server.migration.flags import FLAGS
from server.migration.requests import ABSENT_ROUTES, EXPLAINED, RENAMED, ROUTES, VALUES
from server.migration.suggestions import fields_at, routes_in, unknown_field, value_hint
from server.schemas.adapters import AliasBody, HubBody, LoadLoraBody
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.schemas.generation import GenerateBody
from server.schemas.tokens import DetokenizeBody, TokenizeBody
from server.settings import Settings
from tests.server.keyed import make_service

GENERATING = (GenerateBody, CompletionBody, ChatBody)
BODIES = (*GENERATING, TokenizeBody, DetokenizeBody, AliasBody, HubBody, LoadLoraBody)
NAMED = re.compile(r"'(\w+)'")
FLAG = re.compile(r"--[a-z][a-z-]*")
ELSEWHERE = {"--replicas", "--revision", "--local-dir", "--tenant"}
"""Flags of the programs that a hint names in backticks."""
KINDS = {"json_object", "json_schema", "regex", "lark", "type"}
"""Words that hints quote, and that are no fields of bodies."""


@pytest.mark.parametrize("body", BODIES)
def test_every_field_that_a_hint_names_is_one_of_the_body(body: type) -> None:
    known = fields_at(body, ())
    for name in {*RENAMED, *EXPLAINED} - known:
        hint = unknown_field(name, known)
        assert hint.startswith("unknown field: "), name
        assert set(NAMED.findall(hint)) <= known | KINDS, hint


@pytest.mark.parametrize("body", GENERATING)
def test_every_field_that_a_value_s_hint_names_is_one_of_the_body(body: type) -> None:
    known = fields_at(body, ())
    for (field, kind), _ in VALUES.items():
        hint = value_hint(field, kind(), body) if field in known else ""
        assert set(NAMED.findall(hint)) <= known | KINDS, hint


def test_no_name_is_in_two_tables() -> None:
    assert not RENAMED.keys() & EXPLAINED.keys()
    assert not ROUTES.keys() & ABSENT_ROUTES.keys()


def test_every_route_that_a_hint_names_exists(tokenizer: PreTrainedTokenizerFast) -> None:
    app = create_app(make_service(tokenizer))
    described = {*app.described, ("GET", "/docs")}
    assert {path for _, path in described if path != "/docs"} == app.openapi()["paths"].keys()
    assert {method for method, _ in described} <= set(METHODS)
    texts = [*ROUTES.values(), *(text for hints in (*EXPLAINED.values(), *VALUES.values()) for _, text in hints)]
    for text in texts:
        assert set(routes_in(text)) <= described, text
    assert all(routes_in(text) for text in ROUTES.values())


def test_no_route_of_ours_is_in_the_tables(tokenizer: PreTrainedTokenizerFast) -> None:
    paths = {path for _, path in create_app(make_service(tokenizer)).described}
    for path in (*ROUTES, *ABSENT_ROUTES):
        assert path not in paths
        assert path == path.lower().rstrip("/")


@pytest.mark.parametrize("settings", [Settings, ClusterSettings])
def test_the_table_has_no_flag_of_ours_and_its_hints_name_known_flags(settings: type[Settings]) -> None:
    ours = {flag_of(field) for field in settings.model_fields}
    assert not ours & FLAGS.keys()
    for flag, text in FLAGS.items():
        assert set(FLAG.findall(text)) <= ours | ELSEWHERE, text
        assert flag == STRAY or flag.startswith("-")


def test_a_body_s_fields_are_found_at_every_place() -> None:
    assert fields_at(GenerateBody, ("adapter", 0, "objects")) == {"name", "weight"}
    assert fields_at(ChatBody, ("messages", 3)) >= {"role", "content", "name"}
    assert fields_at(ChatBody, ("messages", 0, "content", "many", 1)) == {"type", "text"}
    assert fields_at(GenerateBody, ("grammar", "regex")) == {"type", "schema", "pattern", "text"}
    assert fields_at(None, ()) == frozenset()


def test_hints_name_exactly_the_kinds_of_grammars() -> None:
    annotation = GenerateBody.model_fields["grammar"].annotation
    kinds = {
        kind
        for model in get_args(get_args(get_args(annotation)[0])[0])
        for kind in get_args(model.model_fields["type"].annotation)
    }
    assert kinds == KINDS - {"type"}
