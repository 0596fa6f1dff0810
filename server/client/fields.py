"""Keyword arguments for the fields of POST /generate, which `server.schemas.generation.GenerateBody` documents.

Absent fields are not sent: the server has the defaults, and refuses wrong values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from lori.merge_options import MergeMethod
from lori.template import Template


class MessageFields(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class WeightedAdapterFields(TypedDict):
    """An adapter with its weight."""

    name: str
    weight: float


class AnyJsonFields(TypedDict):
    """Grammar of any JSON object."""

    type: Literal["json_object"]


class SchemaFields(TypedDict):
    """Grammar of JSON that fits a schema."""

    type: Literal["json_schema"]
    schema: Mapping[str, Any] | bool


class RegexFields(TypedDict):
    """Grammar of text that a regular expression matches as a whole."""

    type: Literal["regex"]
    pattern: str


class LarkFields(TypedDict):
    """Grammar of text in a context-free grammar."""

    type: Literal["lark"]
    text: str


class GenerateFields(TypedDict, total=False):
    """All fields but `stream`, which is a method of the client."""

    prompt: str | Sequence[int]
    messages: Sequence[MessageFields]
    template: Template
    adapter: str | Sequence[str | WeightedAdapterFields] | None
    """All of one form: the server refuses a mixture, which no type can express in a way that checkers infer."""
    weights: Sequence[float]
    merge: MergeMethod
    density: float
    merge_seed: int
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[str, float]
    seed: int
    n: int
    stop: str | Sequence[str]
    include_stop: bool
    grammar: AnyJsonFields | SchemaFields | RegexFields | LarkFields
    ignore_eos: bool
    echo: bool
    logprobs: int
    timeout_s: float
    priority: int
