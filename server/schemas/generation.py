"""Bodies and replies of POST /generate."""

from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from lori.merge_options import MergeMethod
from lori.template import Message, Template
from server.engine.request import FinishReason, SamplingParams
from server.schemas.fields import MAX_LOGPROBS, PROMPT_OR_MESSAGES, Count, Fingerprint, Prompt, Reply, check_num_fields
from server.schemas.sampling import Adapters, MergeFields, SamplingFields

CheckedMessage = Annotated[Message, BeforeValidator(check_num_fields)]
Messages = Annotated[list[CheckedMessage], Field(min_length=1, max_length=1000, fail_fast=True)]


class GenerateBody(SamplingFields, MergeFields):
    """The body of POST /generate."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": PROMPT_OR_MESSAGES,
            "examples": [
                {"messages": [{"role": "user", "content": "What is 12 times 7?"}], "adapter": ["math", "safety"]},
                {"prompt": "Customer: My card has not arrived.\nIntent:", "adapter": "intent", "stop": "\n"},
                {
                    "prompt": "Question: A pen costs $3. How much do 4 pens cost?\nAnswer:",
                    "adapter": [{"name": "math", "weight": 1}, {"name": "safety", "weight": 0.8}],
                    "max_tokens": 64,
                },
            ],
        },
    )

    prompt: Prompt | None = None
    """Text to continue, as it is, or its token ids. Either this or `messages`."""
    messages: Messages | None = None
    """A conversation to answer. It is written in the base's chat template if all its adapters know that, else as plain text."""
    template: Template | None = None
    """The template for `messages`, instead of the default above."""
    adapter: Adapters | None = None
    """A name, `name@version`, several of them, or `{name, weight}` several times: their deltas are added. The base model if
    absent or an empty list."""
    max_tokens: Count | None = None
    """The maximum length of the answer; 128, or what the context has left, if absent. 0 generates nothing, to score a text with
    `echo`."""
    include_stop: bool = False
    """The answer ends after the stop text, not before."""
    echo: bool = False
    """The reply's text, and its log-probabilities, begin with the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Adds log-probabilities, with this many alternatives for each token."""
    stream: bool = False
    """Sends the answer as server-sent events: `token` events, then a `done` for each answer, or `error`."""

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            both = "both" if self.prompt is not None else "neither"
            raise ValueError(f"expected either 'prompt' or 'messages', found {both}")
        if self.template is not None and self.messages is None:
            raise ValueError("'template' is for 'messages'; a 'prompt' stands as it is")
        return self

    @model_validator(mode="after")
    def _sound_weights(self) -> Self:
        if self.weights is not None and self.adapter is None:
            raise ValueError("'weights' needs 'adapter'")
        self.check_weights(self.adapter)
        return self

    def to_sampling(self) -> SamplingParams:
        """Return the engine's sampling parameters."""
        return replace(super().to_sampling(), num_logprobs=self.logprobs)


class ResolvedAdapter(Reply):
    """An adapter as the request used it."""

    name: str
    version: str
    weight: float
    block_weights: list[float] = Field(default_factory=list, exclude_if=lambda weights: not weights)
    """Factors of the weight in blocks of layers, from the first to the last. Absent unless a named merge has them."""
    policy: bool = False
    """The operator adds it to every request."""


class MergeReply(Reply):
    """The merge of the adapters, with the options that have an effect."""

    method: MergeMethod
    density: float | None = None
    sign: str | None = None
    seed: int | None = None
    base_share: float | None = None
    """The base's share of the automatic weights, or of a selection (`auto`); given weights do not count. None if no weight is
    automatic."""


class Usage(Reply):
    """Tokens that a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed again."""


class TimingsReply(Reply):
    """Durations of the phases of a request, in seconds."""

    queue_s: float
    """Until its first step."""
    prefill_s: float
    """From the first step to the first token."""
    decode_s: float
    """From the first token to the end."""
    time_to_first_token_s: float
    total_s: float


class Logprobs(Reply):
    """Log-probabilities in the form of OpenAI's completions: one entry for each token, with those that end the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TokenData(Reply):
    """The data of a `token` event."""

    text: str
    index: int = 0
    """The index of the answer."""
    logprobs: Logprobs | None = None


class DoneData(Reply):
    """The data of the `done` event: the reply without its text."""

    id: str
    index: int = 0
    adapter: list[ResolvedAdapter]
    merge: MergeReply | None
    """None without adapters."""
    template: Template | None = None
    """The template of the messages; None for a `prompt`."""
    finish_reason: FinishReason
    usage: Usage
    timings: TimingsReply
    seed: int
    system_fingerprint: Fingerprint | None = None


class ChoiceReply(Reply):
    """One of several answers."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: Logprobs | None = None


class GenerateReply(Reply):
    """The reply of POST /generate. With several answers, all but `choices` and `usage` is of the first."""

    id: str
    text: str
    adapter: list[ResolvedAdapter]
    merge: MergeReply | None
    template: Template | None = None
    """The template of the messages; None for a `prompt`."""
    finish_reason: FinishReason
    usage: Usage
    timings: TimingsReply
    seed: int
    system_fingerprint: Fingerprint | None = None
    logprobs: Logprobs | None = None
    choices: list[ChoiceReply] | None = None
    """All answers, if the request asks for more than one."""


class Health(Reply):
    """The reply of GET /health, /ping and /ready."""

    status: Literal["ok", "ready"]


class Version(Reply):
    """The reply of GET /version."""

    version: str
