"""Grammars of answers, as bodies express them."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from pydantic import Field

from lori.template import Text
from server.engine.grammar import Grammar
from server.schemas.fields import Body

MAX_LENGTH = 2**18
Source = Annotated[Text, Field(min_length=1, max_length=MAX_LENGTH)]
Schema = dict[str, Any] | bool


class AnyJson(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class BySchema(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: Schema = Field(alias="schema")


class ByRegex(Body):
    """Text that a regular expression matches as a whole."""

    type: Literal["regex"]
    pattern: Source


class ByLark(Body):
    """Text in a context-free grammar, in llguidance's variant of Lark."""

    type: Literal["lark"]
    text: Source


AnyGrammar = Annotated[AnyJson | BySchema | ByRegex | ByLark, Field(discriminator="type")]


class AnyJsonArguments(TypedDict):
    """`AnyJson` in the Python client."""

    type: Literal["json_object"]


class SchemaArguments(TypedDict):
    """`BySchema` in the Python client."""

    type: Literal["json_schema"]
    schema: Mapping[str, Any] | bool


class RegexArguments(TypedDict):
    """`ByRegex` in the Python client."""

    type: Literal["regex"]
    pattern: str


class LarkArguments(TypedDict):
    """`ByLark` in the Python client."""

    type: Literal["lark"]
    text: str


GrammarArguments = AnyJsonArguments | SchemaArguments | RegexArguments | LarkArguments


class AnyText(Body):
    """No format at all."""

    type: Literal["text"]


class NamedSchema(Body):
    """A schema in the form of OpenAI's clients. It is always followed strictly."""

    name: Annotated[Text, Field(max_length=256)] | None = None
    description: Text | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[AnyText | AnyJson | SchemaFormat, Field(discriminator="type")]


def to_grammar(spec: AnyGrammar | ResponseFormat | None, field: str) -> Grammar | None:
    """Return the engine's grammar for `spec`, the value of the body's `field`."""
    match spec:
        case AnyJson():
            return Grammar("json_object", field=field)
        case BySchema():
            return Grammar("json_schema", json.dumps(spec.json_schema), field)
        case SchemaFormat():
            return Grammar("json_schema", json.dumps(spec.json_schema.json_schema), field)
        case ByRegex():
            return Grammar("regex", spec.pattern, field)
        case ByLark():
            return Grammar("lark", spec.text, field)
        case _:
            return None
