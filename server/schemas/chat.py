"""Bodies and replies of POST /v1/chat/completions."""

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from lori.template import Message, Template, Text
from server.engine.request import SamplingParams
from server.schemas.fields import MAX_INT, Body, Fingerprint, Reply, forms, one_or_many
from server.schemas.openai import FinishReason, LoriReply, OpenAIBody, OpenAIUsage, TopLogprobs

MAX_PARTS = 256
Nothing = Annotated[list[Any], Field(max_length=0)]
Note = Annotated[Text, Field(max_length=1024)]


class TextPart(Body):
    """A part of a message. Only text is supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One message of a conversation. An answer from OpenAI may be sent back as it came, with its empty fields."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` means `system`."""
    content: Annotated[
        Annotated[Text, Tag("one")]
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("many")],
        forms(one_or_many, "text, or a list of parts"),
    ]
    name: Note | None = None
    """The name of one of several participants. Ignored, because no template here writes it."""
    refusal: None = None
    """Not supported: must be absent or null, like the next three."""
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None
    """Not supported: must be absent, null or empty."""

    def to_message(self) -> Message:
        """Return the message for the chat template. Parts are joined by newlines."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class ChatBody(OpenAIBody):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "safety", "messages": [{"role": "user", "content": "How do I pick a lock?"}], "max_tokens": 64},
                {
                    "model": "math:1+safety:0.8",
                    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 times 7?"}],
                    "temperature": 0,
                    "max_completion_tokens": 32,
                },
            ]
        }
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000, fail_fast=True)]
    """A conversation to answer. It is written in the base's chat template if all its adapters know that, else as plain text."""
    template: Template | None = None
    """The template for `messages`, instead of the default above."""
    max_tokens: Annotated[int, Field(ge=1, lt=MAX_INT)] | None = None
    """The maximum length of the answer; what the context has left if absent."""
    max_completion_tokens: Annotated[int, Field(ge=1, lt=MAX_INT)] | None = None
    """OpenAI's newer name for `max_tokens`."""
    logprobs: bool | None = None
    """Adds log-probabilities."""
    top_logprobs: TopLogprobs | None = None
    """The number of alternatives for each token."""
    tools: Nothing | None = None
    """Not supported: must be absent or empty."""
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    """Nothing is stored."""
    metadata: Annotated[dict[str, Note], Field(max_length=16)] | None = None
    """A note of the client. Ignored, like the next two."""
    safety_identifier: Note | None = None
    prompt_cache_key: Note | None = None
    service_tier: Literal["auto", "default"] | None = None
    continue_final_message: Literal[False] | None = None
    """An answer is always a new message. vllm-router writes this field and the next three into every body."""
    include_reasoning: bool | None = None
    """Whether reasoning is returned beside the answer. There is none, so both values are accepted."""
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("expected 'max_tokens' or 'max_completion_tokens', found both")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self

    def to_sampling(self) -> SamplingParams:
        """Return the engine's sampling parameters."""
        return replace(super().to_sampling(), num_logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class TopLogprob(Reply):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None
    """The token's text in UTF-8; null if the token is a part of a character, and so has no text."""


class TokenLogprobReply(TopLogprob):
    """A token of the answer, its log-probability, and the likeliest alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log-probabilities in the form of OpenAI's chat completions."""

    content: list[TokenLogprobReply]


class AnswerMessage(Reply):
    """The answer as a message of the conversation."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatReply(Reply):
    """The reply of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: Fingerprint | None = None
    choices: list[ChatChoice]
    usage: OpenAIUsage
    lori: LoriReply


class Delta(Reply):
    """The new part of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _only_what_is_new(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


class ChatChunkChoice(Reply):
    """The new part of one answer, with its index."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Reply):
    """A part of the reply, in a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: Fingerprint | None = None
    choices: list[ChatChunkChoice]
    usage: OpenAIUsage | None = None
    lori: LoriReply | None = None
