"""Bodies and replies of POST /v1/completions."""

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, Tag, model_validator

from lori.template import Text
from server.engine.request import SamplingParams
from server.schemas.fields import Count, Fingerprint, Reply, TokenIds, forms
from server.schemas.generation import Logprobs
from server.schemas.openai import FinishReason, LoriReply, OpenAIBody, OpenAIUsage, TopLogprobs

MAX_PROMPTS = 256
Several = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)


def _form(value: Any) -> str | None:
    if not isinstance(value, list):
        return "one" if isinstance(value, str) else None
    return {list: "lists", int: "numbers", bool: "numbers"}.get(type(value[0]), "texts") if value else "texts"


Prompts = Annotated[
    Annotated[Text, Tag("one")]
    | Annotated[list[Text], Several, Tag("texts")]
    | Annotated[TokenIds, Tag("numbers")]
    | Annotated[list[TokenIds], Several, Tag("lists")],
    forms(_form, "text, a list of token ids, or a list of texts or of such lists"),
]


class CompletionBody(OpenAIBody):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "intent", "prompt": "Customer: My card has not arrived.\nIntent:", "max_tokens": 8, "temperature": 0},
                {"model": "math:1+safety:0.8", "prompt": ["Question: 2 + 3?\nAnswer:"], "max_tokens": 16, "logprobs": 1},
            ]
        }
    )

    prompt: Prompts
    """Text to continue, or its token ids; or a list of either, which run together."""
    max_tokens: Count = 16
    """The maximum length of the answer. 0 generates nothing, to score a text with `echo`."""
    echo: bool = False
    """The reply's text, and its log-probabilities, begin with the prompt."""
    logprobs: TopLogprobs | None = None
    """Adds log-probabilities, with this many alternatives for each token."""
    best_of: Count | None = None
    """Must equal `n`: all answers are returned."""
    suffix: None = None
    """Not supported: must be absent."""

    @model_validator(mode="after")
    def _gives_all(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"'best_of' is {self.best_of}, expected as many as 'n', {self.n}: all answers are given")
        return self

    def to_sampling(self) -> SamplingParams:
        """Return the engine's sampling parameters."""
        return replace(super().to_sampling(), num_logprobs=self.logprobs)


class CompletionChoice(Reply):
    """One answer, or a part of one in a stream."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    lori: LoriReply | None = None
    """As `lori` of the reply, of this answer's own prompt. Only for several prompts, and not in a stream."""


class CompletionReply(Reply):
    """The reply of POST /v1/completions, or a part of one in a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: Fingerprint | None = None
    choices: list[CompletionChoice]
    usage: OpenAIUsage | None = None
    lori: LoriReply | None = None
    """Of the first prompt if there are several, or in a stream of the answer that this part ends."""
