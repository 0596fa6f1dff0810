"""The engine's requests, sequences, chunks of work and events. Plain values: no tensor, no HTTP.

A request is fixed when it is admitted. A sequence is the state of one of its choices inside the engine. A chunk is the part of a
sequence that one step computes. Events are sent to the client.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

from lori.merge_options import DEFAULTS as LINEAR
from lori.merge_options import MergeOptions
from lori.names import NUM_VERSION_DIGITS
from lori.template import Template
from server.engine.grammar import Grammar

FinishReason = Literal["stop", "stop_sequence", "length", "cancelled"]
ErrorKind = Literal["engine", "adapter", "grammar", "timeout", "stop"]
"""Whose fault it was: the engine's own, an adapter's, the request's grammar's, or nobody's: time was up, or the server stops."""


@dataclass(frozen=True, slots=True)
class AdapterTerm:
    """One adapter of a request, as resolved: `weight` is what the client asked for."""

    name: str
    digest: str
    """Of its content: what the adapter is, whatever its name."""
    weight: float

    @property
    def version(self) -> str:
        """The digits of the digest that a client sees."""
        return self.digest[:NUM_VERSION_DIGITS]

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is picked; the defaults change nothing. Applied in the order of the fields, `temperature` last but one.

    Bias, `min_tokens` and the penalties change the logits; `min_p`, `top_k` and `top_p` leave out what is unlikely at this
    temperature. At temperature 0 the likeliest token is taken.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens; minus infinity forbids one."""
    min_tokens: int = 0
    """Before so many output tokens no stop token is picked, and no stop string ends the answer, but where a grammar's end is."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or the output (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens in the output, as often as they are there."""
    temperature: float = 0.0
    top_k: int = 0
    """Leaves this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Leaves the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Leaves tokens of at least this share of the likeliest one's probability."""
    seed: int = 0
    """With the choice it names the request's random stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An admitted request: the engine can run it."""

    id: str
    prompt_text: str
    prompt_ids: tuple[int, ...]
    prompt_offsets: tuple[int, ...]
    """Where each prompt token begins in `prompt_text`, in characters; none without `echo`: they take much memory."""
    max_tokens: int
    template: Template | None = None
    """How the messages of its client were written; None where it sent a prompt."""
    terms: tuple[AdapterTerm, ...] = ()
    merge: MergeOptions = LINEAR
    """How the adapters of `terms` are combined; anything but `linear` is built once and kept as a resident adapter."""
    policy: tuple[AdapterTerm, ...] = ()
    """What the operator adds to every request of this tenant, at these weights, whatever `merge` is."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """The text ends after the stop string, not before it."""
    grammar: Grammar | None = None
    """What the answer has to be; cut at `max_tokens` it is the beginning of that."""
    ignore_eos: bool = False
    """Stop tokens do not end the answer."""
    num_logprobs: int | None = None
    """None: no log-probabilities; else how many alternatives beside the token itself."""
    echo: bool = False
    num_choices: int = 1
    """Answers to the prompt, which is computed once; each has a random stream of its own."""
    priority: int = 0
    """Lower runs earlier."""
    tenant: str = ""
    """Whose share of the engine it uses."""
    timeout_s: float | None = None
    """From its submission to its end."""

    @property
    def residents(self) -> tuple[tuple[str, float], ...]:
        """What must be resident while it runs, digest and weight of each, in order of digest.

        Adapters that are summed are there one by one; any other merge is one, of its own digest and of weight 1.
        """
        merged = self.merged_digest
        summed = self.policy if merged else (*self.terms, *self.policy)
        wanted = [(term.digest, term.weight) for term in summed if term.weight]
        return tuple(sorted([*wanted, (merged, 1.0)] if merged else wanted))

    @property
    def merged_digest(self) -> str | None:
        """The digest of what is built of `terms`; None where they are summed, or count for nothing."""
        wanted = sorted((term.digest, term.weight) for term in self.terms if term.weight)
        if self.merge.method == "linear" or not wanted:
            return None
        said = json.dumps([dict(self.merge.used), wanted], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()


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
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a choice's time went, in seconds; 0 where it did not come so far."""

    queue: float = 0.0
    """From its submission to its first step."""
    prefill: float = 0.0
    """From there to its first token."""
    decode: float = 0.0
    """From there to its end."""

    @property
    def first_token(self) -> float:
        """From its submission to its first token."""
        return self.queue + self.prefill

    @property
    def total(self) -> float:
        """From its submission to its end."""
        return self.queue + self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The last event of a choice that ended well. `num_cached_tokens` of its prompt were not computed again."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    choice: int = 0
    num_cached_tokens: int = 0
    timings: Timings = field(default=Timings(), compare=False)


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The last event of a request that failed inside the engine, with all its choices."""

    message: str
    kind: ErrorKind = "engine"


Event = TextEvent | DoneEvent | ErrorEvent


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One choice of a request inside the engine. `num_computed` of its tokens have their keys and values in `blocks`."""

    request: Request
    choice: int = 0
    output_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    """Tokens of the prompt that were found in the prefix cache when it first ran."""
    num_found: int = 0
    """Tokens that were found computed when it last joined."""
    num_preemptions: int = 0
    """How often it gave up its blocks for others and had to be computed again."""
    keys: list[bytes] = field(default_factory=list, repr=False)
    """What its full blocks are found by in the prefix cache, as far as they were asked for."""
    deadline: float | None = None
    """When its time is up, in monotonic seconds."""
    residents: tuple[tuple[str, float], ...] = field(init=False)
    """As its request's: what must be resident while it runs."""
    merged_digest: str | None = field(init=False)
    """As its request's: the one of `residents` that is a merge."""
    priority: int = field(init=False)
    """Its request's; once it is overdue, the highest there was while it waited. All scheduling goes by this one."""
    is_overdue: bool = False
    """Whether it has waited longer than its priority may make it."""
    terms: list[tuple[int, float]] | None = None
    """While it is pinned: the slot of each resident, and the weight with the adapter's alpha / r in it."""

    def __post_init__(self) -> None:
        self.residents, self.merged_digest = self.request.residents, self.request.merged_digest
        self.priority = self.request.priority

    @property
    def is_raised(self) -> bool:
        """Whether it was given a higher priority than its request's."""
        return self.priority < self.request.priority

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def max_num_tokens(self) -> int:
        """What `num_tokens` can grow to."""
        return len(self.request.prompt_ids) + self.request.max_tokens

    def ids(self, start: int, stop: int) -> list[int]:
        """Return the tokens from `start` to `stop`."""
        num_prompt = len(self.request.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : stop - num_prompt]
        return [*self.request.prompt_ids[start:stop], *self.output_ids[: max(0, stop - num_prompt)]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens `start` to `stop` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the token after this chunk is to be sampled."""
        return self.stop == self.sequence.num_tokens and self.sequence.request.max_tokens > 0
