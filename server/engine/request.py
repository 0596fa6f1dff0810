"""What the engine is asked and what it answers. Plain values; no tensor, no HTTP.

A request is fixed when it is admitted; a sequence is its state inside the engine; events are what the client hears.
"""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "stop_sequence", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class AdapterTerm:
    """One adapter of a request, as resolved: `scale` is its alpha / r, `weight` what the client asked for."""

    name: str
    version: str
    weight: float
    scale: float


@dataclass(frozen=True, slots=True)
class Request:
    """An admitted request: the engine can run it."""

    id: str
    prompt_text: str
    prompt_ids: tuple[int, ...]
    prompt_offsets: tuple[int, ...]
    """Where each prompt token begins in `prompt_text`, in characters."""
    terms: tuple[AdapterTerm, ...]
    max_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...]
    num_logprobs: int | None
    """None: no log-probabilities; else how many alternatives beside the token itself."""
    echo: bool


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token; `value` is None for the first token of a text, which nothing predicts."""

    token: str
    text_offset: int
    value: float | None
    top: dict[str, float]


@dataclass(frozen=True, slots=True)
class TextEvent:
    """More text, and the log-probabilities of tokens since the last event. Text may be empty: half a character waits.

    `is_prompt`: no token was generated yet, this is the echo.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    is_prompt: bool = False


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The last event of a request that ended well."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The last event of a request that failed inside the engine."""

    message: str


Event = TextEvent | DoneEvent | ErrorEvent


@dataclass(slots=True, eq=False)
class Sequence:
    """A request inside the engine. `num_computed` of its tokens have their keys and values in `blocks`."""

    request: Request
    output_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    is_aborted: bool = False

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def max_num_tokens(self) -> int:
        """What `num_tokens` can grow to."""
        return len(self.request.prompt_ids) + self.request.max_tokens

    def ids(self, start: int, stop: int) -> list[int]:
        """Returns the tokens from `start` to `stop`."""
        num_prompt = len(self.request.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : stop - num_prompt]
        return [*self.request.prompt_ids[start:stop], *self.output_ids[: max(0, stop - num_prompt)]]
