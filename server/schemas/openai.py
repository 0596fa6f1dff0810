"""What OpenAI's routes have in common: what is asked for beside the prompt, and what it cost."""

from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lori.template import Template, Text
from server.schemas.fields import MAX_LOGPROBS, Body, Reply, Temperature
from server.schemas.generation import MergeReply, ResolvedAdapter, TimingsReply
from server.schemas.grammars import ResponseFormat
from server.schemas.sampling import Adapters, MergeFields, SamplingFields

Model = Annotated[Text, Field(min_length=1, max_length=4096)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
FinishReason = Literal["stop", "length"]
NULL = {"type": "null"}
ABOUT = ("title", "description", "default")
"""Of a field in a JSON schema, what is no part of its type."""


class NullableBody(Body):
    """A body whose fields may all be null where they may be absent, which is the same: OpenAI's clients write None so."""

    @model_validator(mode="before")
    @classmethod
    def _absent_where_null(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        optional = cls._optional()
        return {key: of for key, of in value.items() if of is not None or key not in optional}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Says so of each field."""
        schema = handler(core_schema)
        fields = handler.resolve_ref_schema(schema)["properties"]
        for name in cls._optional():
            if NULL not in (fields[name], *fields[name].get("anyOf", ())) and fields[name].get("type") != "null":
                about = {key: fields[name].pop(key) for key in ABOUT if key in fields[name]}
                fields[name] = {"anyOf": [fields[name], NULL], **about}
        return schema

    @classmethod
    def _optional(cls) -> AbstractSet[str]:
        return {name for name, of in cls.model_fields.items() if not of.is_required()}


class StreamOptions(NullableBody):
    """What a stream says beside its text."""

    include_usage: bool = False
    """A last chunk, without choices, has the usage."""


class OpenAIBody(SamplingFields, MergeFields, NullableBody):
    """What every body of OpenAI's routes can say. Beside OpenAI's fields, vLLM's for sampling, and this server's for adapters."""

    model: Model | None = None
    """The base model, an adapter, `math+safety`, or `math:0.7+safety:0.3`; absent: the base model."""
    adapters: Adapters | None = None
    """Adapters, where `model` is the base model: as POST /generate's `adapter`."""
    temperature: Temperature = 1.0
    """0 takes the likeliest token each time."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Draws the tokens; absent: a random one, named in the reply."""
    include_stop_str_in_output: bool = False
    """The answer ends after the stop text, not before."""
    response_format: ResponseFormat | None = None
    """JSON, or JSON of a schema; `grammar` has more."""
    stream: bool = False
    """Sends the answer as server-sent events, as OpenAI does."""
    stream_options: StreamOptions | None = None
    user: Annotated[Text, Field(max_length=1024)] | None = None
    """Whom the request is for, to the client; it changes nothing."""
    skip_special_tokens: Literal[True] | None = None
    """Special tokens are never text. vllm-router writes this and the next two into every body."""
    no_stop_trim: Literal[False] | None = None
    """`include_stop_str_in_output` is what leaves the stop text there."""
    return_hidden_states: Literal[False] | None = None
    """None are returned."""

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is for streams; 'stream' is false")
        if self.grammar is not None and self.response_format is not None:
            raise ValueError("expected 'grammar' or 'response_format', found both")
        self.check_weights(self.adapters)
        return self


class CachedTokens(Reply):
    """Tokens of the prompt that were not computed again."""

    cached_tokens: int


class OpenAIUsage(Reply):
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class LoriReply(Reply):
    """What OpenAI's replies do not say: the adapters as resolved, what drew the tokens, where the time went."""

    adapter: list[ResolvedAdapter]
    merge: MergeReply | None
    template: Template | None = None
    """How the messages were written; None for a `prompt`."""
    seed: int
    timings: TimingsReply | None = None


class ModelCard(Reply):
    """A model that can be asked for: the base model, or an adapter on it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lori-server"] = "lori-server"
    root: str
    """The base model's name; an adapter's `name@version`."""
    parent: str | None
    """What an adapter is on."""
    max_model_len: int


class ModelList(Reply):
    """The reply of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
