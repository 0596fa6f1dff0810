"""Keyword arguments for the fields of POST /generate, which `server.schemas.generation.GenerateBody` documents.

Absent fields are not sent: the server has the defaults, and refuses wrong values.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

from lori.template import Template
from server.engine.request import RequestedWeight
from server.schemas.sampling import MergeArguments, SamplingArguments


class MessageFields(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class WeightedAdapterFields(TypedDict):
    """An adapter with its weight."""

    name: str
    weight: RequestedWeight


class GenerateFields(SamplingArguments, MergeArguments, total=False):
    """All fields but `stream`, which is a method of the client."""

    prompt: str | Sequence[int]
    messages: Sequence[MessageFields]
    template: Template
    adapter: str | Sequence[str | WeightedAdapterFields] | None
    """All of one form: the server refuses a mixture, which no type can express in a way that checkers infer."""
    max_tokens: int
    include_stop: bool
    echo: bool
    logprobs: int
