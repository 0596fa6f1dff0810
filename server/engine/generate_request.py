"""Requests for answers as clients send them, by any route, and their refusal. Plain values: no tensor, no asyncio."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lori.merge_options import DEFAULTS as LINEAR
from lori.merge_options import MergeOptions
from lori.template import Message, Template
from server.engine.adapters.registry import MayUse
from server.engine.request import RequestedWeights, SamplingParams

T = TypeVar("T", int, float)
DEFAULT_MAX_TOKENS = 128
CAPPED_TOKENS = "the operator's cap for all answers to one request"


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt given as token ids."""

    ids: tuple[int, ...]


Prompt = str | Sequence[Message] | TokenPrompt
"""A text, a conversation, or token ids."""


def prompt_size(prompt: Prompt) -> int:
    """Return the size of a prompt, in characters or tokens."""
    if isinstance(prompt, str | TokenPrompt):
        return len(prompt if isinstance(prompt, str) else prompt.ids)
    return sum(len(message.content) for message in prompt)


class RefusedError(Exception):
    """A request that cannot be served. Names the field, the value found and the value expected."""

    def __init__(self, field: str, message: str) -> None:
        self.field, self.message = field, message
        super().__init__(f"{field}: {message}")


@dataclass(frozen=True, slots=True)
class Caps:
    """The operator's limits on one request; None is no limit."""

    max_s: float | None = None
    """Maximum `timeout_s`, in seconds from submission to end. Also the timeout of requests that set none."""
    max_tokens: int | None = None
    """Maximum number of tokens of all answers together."""

    def lowered(self, max_s: float | None, max_tokens: int | None) -> "Caps":
        """Return these caps, each lowered to the given value if that is less."""
        return Caps(_smaller(self.max_s, max_s), _smaller(self.max_tokens, max_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A request as the client sent it, by any route. Admission resolves it to a `Request`."""

    prompt: Prompt
    template: Template | None = None
    adapters: tuple[str, ...] = ()
    """References: `name` or `name@version`."""
    weights: RequestedWeights = None
    weights_field: str = "weights"
    """The field that errors about the weights name. `adapter` if they stand there, which OpenAI's routes rename."""
    block_weights: tuple[tuple[float, ...], ...] = ()
    """Of each adapter, see `lori.merge.merge`; empty if none has any."""
    merge_of_adapter: tuple[str, ...] = ()
    """For each adapter the named merge that it comes from, or an empty text. Empty if the request names no merge."""
    merge: MergeOptions = LINEAR
    may_use: MayUse = lambda _: True
    """Whether the caller may use the adapters of a name."""
    base_share: float | None = None
    """The share of the base, if the server has chosen the adapters by the prompt."""
    policy: tuple[tuple[str, float], ...] = ()
    """Adapters that the operator adds to every request of this caller: `name` or `name@version`, and weight."""
    max_tokens: int | None = None
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS
    """Limit if `max_tokens` is None and the context has room for it; None allows all the room."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int | None = None
    """Priority; None is 0."""
    tenant: str = ""
    timeout_s: float | None = None
    caps: Caps = Caps()

    @property
    def is_sum(self) -> bool:
        """Whether the kernels sum the adapters. Otherwise their merge is built."""
        return self.merge.method == "linear"


def check_caps(request: GenerateRequest) -> None:
    """Raise `RefusedError` if the request asks for more tokens than the operator's cap allows."""
    cap = request.caps.max_tokens
    if cap is None:
        return
    num_choices = request.sampling.num_choices
    if num_choices > cap:
        raise RefusedError("n", f"is {num_choices}, expected {cap} at most: {CAPPED_TOKENS}")
    if (request.max_tokens or 0) * num_choices > cap:
        choices_note = f" with n {num_choices}" if num_choices > 1 else ""
        max_each = cap // num_choices
        raise RefusedError("max_tokens", f"is {request.max_tokens}{choices_note}, expected {max_each} at most: {CAPPED_TOKENS}")


def checked_timeout_s(request: GenerateRequest) -> float | None:
    """Return the request's timeout in seconds, or the operator's cap. Raises `RefusedError` if it exceeds the cap."""
    cap = request.caps.max_s
    if cap is not None and request.timeout_s is not None and request.timeout_s > cap:
        raise RefusedError("timeout_s", f"is {request.timeout_s:g}, expected {cap:g} at most: the operator's cap for one request")
    return cap if request.timeout_s is None else request.timeout_s


def _smaller(first: T | None, second: T | None) -> T | None:
    return min((value for value in (first, second) if value is not None), default=None)
