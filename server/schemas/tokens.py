"""Bodies and replies of POST /tokenize and /detokenize, in vLLM's form."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from lori.template import Template, Text
from server.schemas.chat import ChatMessage
from server.schemas.fields import PROMPT_OR_MESSAGES, AnyTokenIds, Body, Reply
from server.schemas.openai import Model


class TokenizeBody(Body):
    """The body of POST /tokenize."""

    model_config = ConfigDict(json_schema_extra={"oneOf": PROMPT_OR_MESSAGES, "examples": [{"prompt": "The quick brown fox"}]})

    model: Model | None = None
    """The base model, or any other model name of POST /v1/completions. All have one tokenizer, but `messages` are written as for
    the adapters that it names."""
    prompt: Text | None = None
    """Text as it is. Either this or `messages`."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    """A conversation, written as POST /v1/chat/completions writes it for `model`."""
    template: Template | None = None
    """The template for `messages`, instead of the default above."""
    add_special_tokens: bool = False
    """Adds the tokenizer's special tokens around the text. No route that generates does."""
    return_token_strs: bool = False
    """Adds the tokens' texts."""

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError(f"expected either 'prompt' or 'messages', found {'both' if self.prompt is not None else 'neither'}")
        if self.template is not None and self.messages is None:
            raise ValueError("'template' is for 'messages'; a 'prompt' stands as it is")
        return self


class TokenizeReply(Reply):
    """The reply of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    template: Template | None = None
    """The template of the messages; None for a `prompt`."""
    token_strs: list[str] | None = None


class DetokenizeBody(Body):
    """The body of POST /detokenize."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [504, 2365, 6354, 16438]}]})

    model: Model | None = None
    """As in POST /tokenize."""
    tokens: AnyTokenIds


class DetokenizeReply(Reply):
    """The reply of POST /detokenize."""

    prompt: str
