"""What OpenAI's routes have in common: what is asked for beside the prompt, and what it cost."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lori.template import Text
from server.schemas.fields import MAX_LOGPROBS, Body, Reply, Temperature
from server.schemas.generation import MergeReply, ResolvedAdapter, TimingsReply
from server.schemas.grammars import ResponseFormat
from server.schemas.sampling import Adapters, MergeFields, SamplingFields

Model = Annotated[Text, Field(min_length=1, max_length=4096)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
FinishReason = Literal["stop", "length"]


class StreamOptions(Body):
    """What a stream says beside its text."""

    include_usage: bool = False
    """A last chunk, without choices, has the usage."""


class OpenAIBody(SamplingFields, MergeFields):
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
