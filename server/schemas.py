"""What is on the wire of this server's own routes."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lori.template import Message, Template, Text
from server.engine.request import FinishReason

MAX_LOGPROBS = 20
MAX_WEIGHT = 16.0
MAX_FIELDS = 64


def _is_not_empty(value: str) -> str:
    if not value:
        raise ValueError("is empty, expected text")
    return value


StopText = Annotated[Text, AfterValidator(_is_not_empty)]
AdapterName = Annotated[Text, Field(max_length=256)]
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]


class GenerateBody(BaseModel):
    """The body of POST /generate."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "What is 12 times 7?"}], "adapter": ["math", "safety"]},
                {"prompt": "Customer: My card has not arrived.\nIntent:", "adapter": "intent", "stop": "\n"},
            ]
        },
    )

    prompt: Text | None = None
    """Text to continue, as it stands. Either this or `messages`."""
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    """A conversation to answer, written with the adapter's own template."""
    template: Template | None = None
    """How `messages` are written, where it is not to be the adapter's own way."""
    adapter: AdapterName | Annotated[list[AdapterName], Field(max_length=64, fail_fast=True)] | None = None
    """The adapter's name, or several names: their deltas are added. Absent, or an empty list: the base model."""
    weights: Annotated[list[Weight], Field(max_length=64, fail_fast=True)] | None = None
    """One for each adapter; absent: each 1/n."""
    max_tokens: int | None = Field(default=None, ge=0)
    """The longest answer; absent: 128, or what the context has left. 0 generates nothing, to score a text with `echo`."""
    temperature: float = Field(default=0.0, ge=0, le=100, allow_inf_nan=False)
    """0 takes the likeliest token each time."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Draws the tokens; absent: a random one, named in the reply."""
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    """The answer ends before any of these."""
    ignore_eos: bool = False
    """The end of text does not end the answer: it has `max_tokens` tokens, to measure with."""
    echo: bool = False
    """The reply's text, and its log-probabilities, begin with the prompt."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Adds log-probabilities, with this many alternatives for each token."""
    stream: bool = False
    """Sends the answer as server-sent events: `token` events, then `done` or `error`."""

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, body: Any) -> Any:
        # Each unknown field is an error of its own: a body of nothing else would cost seconds.
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            raise ValueError(f"the body has {len(body)} fields, expected at most {MAX_FIELDS}")
        return body

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            both = "both" if self.prompt is not None else "neither"
            raise ValueError(f"expected either 'prompt' or 'messages', found {both}")
        if self.template is not None and self.messages is None:
            raise ValueError("'template' is for 'messages'; a 'prompt' stands as it is")
        if self.weights is not None and self.adapter is None:
            raise ValueError("'weights' needs 'adapter'")
        return self


class ResolvedAdapter(BaseModel):
    """An adapter as the request used it."""

    name: str
    version: str
    weight: float


class Usage(BaseModel):
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(BaseModel):
    """Log-probabilities in the form of OpenAI's completions: one entry for each token, those that end the text included."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TokenData(BaseModel):
    """The data of a `token` event."""

    text: str
    logprobs: Logprobs | None = None


class DoneData(BaseModel):
    """The data of the `done` event: the reply without its text."""

    id: str
    adapter: list[ResolvedAdapter]
    finish_reason: FinishReason
    usage: Usage
    seed: int


class GenerateReply(DoneData):
    """The reply of POST /generate."""

    text: str
    logprobs: Logprobs | None = None


class AdapterInfo(BaseModel):
    """An adapter that can be asked for."""

    name: str
    version: str
    rank: int
    alpha: float
    sparsity: float
    templates: list[Template]
    merge_weights: dict[str, tuple[float, float]]
    metrics: dict[str, float]


class AdapterList(BaseModel):
    """The reply of GET /adapters."""

    base_model: str
    adapters: list[AdapterInfo]


class Health(BaseModel):
    """The reply of GET /health and GET /ready."""

    status: Literal["ok", "ready"]


class ErrorDetail(BaseModel):
    """What was wrong: `param` is the field, where it was one."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def error_reply(status: int, kind: str, message: str, param: str | None) -> dict[str, Any]:
    """Returns the body of an error. A message may quote what the client sent, be it text or not."""
    sound = message.encode("utf-8", "backslashreplace").decode()
    return ErrorReply(error=ErrorDetail(message=sound, type=kind, param=param, code=status)).model_dump()
