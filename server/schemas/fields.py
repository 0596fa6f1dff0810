"""Fields that several bodies share, with their limits."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    WithJsonSchema,
    model_validator,
)

from lori.merge_options import MAX_WEIGHT
from lori.template import Text

MAX_LOGPROBS = 20
MAX_FIELDS = 64
MAX_STOPS = 16
MAX_CHOICES = 64
MAX_BIASED = 1024
MAX_INT = 2**31
MAX_PROMPT_TOKENS = 2**20
"""More than any context. A longer list is refused before its elements are checked."""

BODY = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


def check_num_fields(value: Any) -> Any:
    """Return `value`.

    Raises `ValueError` for very many fields, each of which could be an error of its own: that would take seconds.
    """
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"too many fields: {len(value)}, expected at most {MAX_FIELDS}")
    return value


class Body(BaseModel):
    """A request body, or a part of one. Values are never converted, and an unknown field is an error."""

    model_config = BODY

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return check_num_fields(value)


Fingerprint = Annotated[
    str, Field(description="What computed the answer. Servers with other fingerprints may give different answers.")
]
"""A name made of the version, the instruction set or GPU, the dtype and the quantization."""


class Reply(BaseModel):
    """A reply, or a part of one."""

    model_config = ConfigDict(use_attribute_docstrings=True)


def _are_few(bias: Any) -> Any:
    # As with fields: each token could be an error of its own.
    if isinstance(bias, dict) and len(bias) > MAX_BIASED:
        raise ValueError(f"too many tokens: {len(bias)}, expected at most {MAX_BIASED}")
    return bias


PROMPT_OR_MESSAGES: list[JsonValue] = [
    {"required": ["prompt"], "properties": {"prompt": {"not": {"type": "null"}}, "messages": {"type": "null"}}},
    {"required": ["messages"], "properties": {"messages": {"not": {"type": "null"}}, "prompt": {"type": "null"}}},
]
"""For a body's `oneOf`: the combinations of these fields that are allowed."""


def check_range(tokens: list[int]) -> list[int]:
    """Return `tokens`. Raises `ValueError` if one is less than 0, or `MAX_INT` or more."""
    for token in (min(tokens), max(tokens)) if tokens else ():
        if not 0 <= token < MAX_INT:
            shown = token if abs(token) < 2**64 else f"of {token.bit_length()} bits"
            raise ValueError(f"has the token {shown}, expected 0 to {MAX_INT - 1}")
    return tokens


def _is_not_empty(value: str) -> str:
    if not value:
        raise ValueError("is empty, expected text")
    return value


def forms(form_of: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Return a discriminator of a field's forms. `form_of` returns the form of a value, or None if it has none of them.

    Errors then concern that form only, or say that another kind of value was expected.
    """
    return Discriminator(form_of, "no_form", f"expected {expected}")


def one_or_many(value: Any) -> str | None:
    """Return the form of a text or of a list."""
    return "one" if isinstance(value, str) else "many" if isinstance(value, list) else None


StopText = Annotated[Text, AfterValidator(_is_not_empty), WithJsonSchema({"type": "string", "minLength": 1})]
Stops = Annotated[
    Annotated[StopText, Tag("one")] | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("many")],
    forms(one_or_many, "text, or a list of texts"),
]
AdapterName = Annotated[Text, Field(max_length=256)]
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=MAX_INT)]
TokenId = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_INT})]
"""The range is checked for a whole list at once: pydantic takes 70 ns to check it for each element."""
AnyTokenIds = Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True), AfterValidator(check_range)]
TokenIds = Annotated[
    list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True), AfterValidator(check_range)
]
Prompt = Annotated[
    Annotated[Text, Tag("one")] | Annotated[TokenIds, Tag("many")],
    forms(one_or_many, "text, or a list of token ids"),
]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda top_k: max(0, top_k))]
MinP = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=100)]
NumChoices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias],
    Field(max_length=MAX_BIASED, json_schema_extra={"additionalProperties": False}),
    BeforeValidator(_are_few),
]
"""Biases by token id. The ids are text, as all keys in JSON."""
