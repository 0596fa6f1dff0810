"""What an answer has to be, as bodies say it."""

import json
from typing import Annotated, Any, Literal

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
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: Schema = Field(alias="schema")


class ByRegex(Body):
    """Text that a regular expression matches, whole."""

    type: Literal["regex"]
    pattern: Source


class ByLark(Body):
    """Text of a context-free grammar, in llguidance's variant of Lark."""

    type: Literal["lark"]
    text: Source


AnyGrammar = Annotated[AnyJson | BySchema | ByRegex | ByLark, Field(discriminator="type")]


class AnyText(Body):
    """No format at all."""

    type: Literal["text"]


class NamedSchema(Body):
    """A schema as OpenAI's clients send it. It is followed strictly, whatever they say."""

    name: Annotated[Text, Field(max_length=256)] | None = None
    description: Text | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[AnyText | AnyJson | SchemaFormat, Field(discriminator="type")]


def to_grammar(found: AnyGrammar | ResponseFormat | None, field: str) -> Grammar | None:
    """Return what a body asks for in `field`, as the engine has it."""
    match found:
        case AnyJson():
            return Grammar("json_object", field=field)
        case BySchema():
            return Grammar("json_schema", json.dumps(found.json_schema), field)
        case SchemaFormat():
            return Grammar("json_schema", json.dumps(found.json_schema.json_schema), field)
        case ByRegex():
            return Grammar("regex", found.pattern, field)
        case ByLark():
            return Grammar("lark", found.text, field)
        case _:
            return None
