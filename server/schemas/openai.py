"""Fields that OpenAI's routes share: all but the prompt, and the usage."""

from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lori.template import Template, Text
from server.engine.request import SamplingParams
from server.schemas.fields import MAX_LOGPROBS, Body, Reply, Temperature
from server.schemas.generation import MergeReply, ResolvedAdapter, TimingsReply
from server.schemas.grammars import ResponseFormat, to_grammar
from server.schemas.sampling import Adapters, MergeFields, SamplingFields

Model = Annotated[Text, Field(min_length=1, max_length=4096)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
FinishReason = Literal["stop", "length"]
NULL = {"type": "null"}
NON_TYPE_KEYS = ("title", "description", "default")
"""Keys of a field in a JSON schema that are no part of its type."""


class NullableBody(Body):
    """A body whose optional fields may all be null, which means absent: OpenAI's clients send None so."""

    @model_validator(mode="before")
    @classmethod
    def _absent_where_null(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        optional = cls._optional()
        return {key: field for key, field in value.items() if field is not None or key not in optional}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Add null to the types of the optional fields."""
        schema = handler(core_schema)
        fields = handler.resolve_ref_schema(schema)["properties"]
        for name in cls._optional():
            if NULL not in (fields[name], *fields[name].get("anyOf", ())) and fields[name].get("type") != "null":
                about = {key: fields[name].pop(key) for key in NON_TYPE_KEYS if key in fields[name]}
                fields[name] = {"anyOf": [fields[name], NULL], **about}
        return schema

    @classmethod
    def _optional(cls) -> AbstractSet[str]:
        return {name for name, info in cls.model_fields.items() if not info.is_required()}


class StreamOptions(NullableBody):
    """Options of a stream."""

    include_usage: bool = False
    """Adds a last chunk, without choices, that has the usage."""


class OpenAIBody(SamplingFields, MergeFields, NullableBody):
    """Fields of all bodies of OpenAI's routes: OpenAI's own, vLLM's for sampling, and this server's for adapters."""

    model: Model | None = None
    """The base model, an adapter, `math+safety`, or `math:1+safety:0.8`; a weight may be `auto`. The base model if absent."""
    adapters: Adapters | None = None
    """Adapters, if `model` is the base model: as `adapter` of POST /generate."""
    temperature: Temperature = 1.0
    """0 takes the likeliest token each time."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Seed of the sampling; random if absent, and given in the reply."""
    include_stop_str_in_output: bool = False
    """The answer ends after the stop text, not before."""
    response_format: ResponseFormat | None = None
    """JSON, or JSON that fits a schema. `grammar` has more forms."""
    stream: bool = False
    """Sends the answer as server-sent events, as OpenAI does."""
    stream_options: StreamOptions | None = None
    user: Annotated[Text, Field(max_length=1024)] | None = None
    """The client's name for its user. Ignored."""
    skip_special_tokens: Literal[True] | None = None
    """Special tokens are never text. vllm-router writes this field and the next two into every body."""
    no_stop_trim: Literal[False] | None = None
    """Use `include_stop_str_in_output` to keep the stop text."""
    return_hidden_states: Literal[False] | None = None
    """No hidden states are returned."""

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is for streams; 'stream' is false")
        if self.grammar is not None and self.response_format is not None:
            raise ValueError("expected 'grammar' or 'response_format', found both")
        self.check_weights(self.adapters)
        return self

    def to_sampling(self) -> SamplingParams:
        """Return the engine's sampling parameters."""
        sampling = super().to_sampling()
        grammar = sampling.grammar or to_grammar(self.response_format, "response_format")
        return replace(sampling, include_stop=self.include_stop_str_in_output, grammar=grammar)


class CachedTokens(Reply):
    """Tokens of the prompt that were not computed again."""

    cached_tokens: int


class OpenAIUsage(Reply):
    """Tokens that a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class LoriReply(Reply):
    """Values that OpenAI's replies lack: the resolved adapters, the seed and the timings."""

    adapter: list[ResolvedAdapter]
    merge: MergeReply | None
    template: Template | None = None
    """The template of the messages; None for a `prompt`."""
    seed: int
    timings: TimingsReply | None = None


class ModelCard(Reply):
    """A model that requests can name: the base model, or an adapter on it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lori-server"] = "lori-server"
    root: str
    """The base model's name, or an adapter's `name@version`."""
    parent: str | None
    """The base model of an adapter."""
    max_model_len: int


class ModelList(Reply):
    """The reply of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
