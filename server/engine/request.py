"""The engine's requests, sequences, chunks and events. Plain values: no tensor, no HTTP.

A request never changes after admission. A sequence is the state of one choice of a request inside the engine. A chunk is the part
of a sequence that one step computes. Events are sent to the client.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from lori.merge_options import DEFAULTS as LINEAR
from lori.merge_options import MergeOptions
from lori.names import NUM_VERSION_DIGITS
from lori.template import Template
from server.engine.grammar import Grammar

if TYPE_CHECKING:  # a cluster's ingress need not import numpy
    from lori.auto_weights import Shares, WeightQuery
    from lori.kernels import Weight

FinishReason = Literal["stop", "stop_sequence", "length", "cancelled"]
RequestedWeight = float | Literal["auto"]
RequestedWeights = tuple[RequestedWeight, ...] | Literal["auto"] | None
"""Weights as a client gives them: one for each adapter, a number or `auto` (from the prompt); `auto` alone, for all; or None, the
server's default."""
ErrorKind = Literal["engine", "adapter", "grammar", "timeout", "stop"]
"""The cause of a failure: the engine, an adapter, the request's grammar, the timeout, or the server's shutdown."""


ResidentWeight = float | tuple[float, ...]
"""The weight of a resident adapter: one number, or one for each block of layers, as in `lori.merge.merge`."""


@dataclass(frozen=True, slots=True)
class AdapterTerm:
    """One resolved adapter of a request. Its `weight` is 0 until an automatic one is computed."""

    name: str
    digest: str
    """Digest of the adapter's content. It identifies the adapter, whatever its name is."""
    weight: float
    is_automatic: bool = False
    """Whether the weight comes from the prompt."""
    block_weights: tuple[float, ...] = ()
    """Factors of the weight in blocks of layers, see `lori.merge.merge`; 1 in all layers if empty."""

    @property
    def resident_weight(self) -> ResidentWeight:
        """The weight in all layers, or in each block of them."""
        return tuple(self.weight * factor for factor in self.block_weights) if self.block_weights else self.weight

    @property
    def has_weight(self) -> bool:
        """Whether the adapter counts in some layer."""
        return self.weight != 0 and any(self.block_weights or (1.0,))

    @property
    def version(self) -> str:
        """The digits of the digest that clients see."""
        return self.digest[:NUM_VERSION_DIGITS]

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of the answers to a request, as the client chose them. The defaults change nothing.

    The wire's bodies make this value (`server.schemas.sampling`), and the request carries it whole. The first fields apply in
    their order: bias, `min_tokens` and the penalties change the logits; `top_k`, `top_p` and `min_p` drop unlikely tokens at this
    temperature. At temperature 0 the most likely token is taken.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    """Values added to the logits of these tokens; minus infinity forbids a token."""
    min_tokens: int = 0
    """Number of output tokens before which no stop token is sampled and no stop string ends the answer. The end of a grammar
    still ends it."""
    repetition_penalty: float = 1.0
    """Divides positive logits and multiplies negative logits of tokens in the prompt or the output (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output, once for each occurrence."""
    temperature: float = 0.0
    top_k: int = 0
    """Number of most likely tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Keeps tokens whose probability is at least this fraction of the most likely token's."""
    seed: int = 0
    """Seed of the request's random stream, together with the choice's number: 0 to 2**64 - 1."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    include_stop: bool = False
    """Whether the text ends after the stop string, not before it."""
    grammar: Grammar | None = None
    """Grammar of the answer. An answer cut at `max_tokens` is a prefix of a text that follows the grammar."""
    ignore_eos: bool = False
    """Whether stop tokens do not end the answer."""
    num_logprobs: int | None = None
    """Number of alternatives to report beside each token's own log-probability; None reports no log-probabilities."""
    echo: bool = False
    """Whether the text begins with the prompt."""
    num_choices: int = 1
    """Number of answers to the prompt. The prompt is computed once; each answer has its own random stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An admitted request, which the engine can run."""

    id: str
    prompt_text: str
    prompt_ids: tuple[int, ...]
    prompt_offsets: tuple[int, ...]
    """Start of each prompt token in `prompt_text`, in characters. Empty without `echo`, since offsets take much memory."""
    max_tokens: int
    template: Template | None = None
    """Template of the conversation; None if the client sent a prompt."""
    terms: tuple[AdapterTerm, ...] = ()
    merge_names: tuple[str, ...] = ()
    """The named merges that some of `terms` come from, in the request's order."""
    merge: MergeOptions = LINEAR
    """Method that combines the adapters of `terms`. `linear` sums them; any other merge is built once, and cached as a resident
    adapter."""
    auto: "WeightQuery | None" = None
    """Set while the automatic weights of `terms` are still to be computed from the prompt. Until then they are 0."""
    base_share: float | None = None
    """The base's share of the automatic weights, or of a selection. None if no weight is automatic."""
    policy: tuple[AdapterTerm, ...] = ()
    """Adapters that the operator adds to every request of this tenant, at these weights, whatever `merge` is."""
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    """Lower values run earlier."""
    tenant: str = ""
    """Tenant that the request's tokens are charged to."""
    timeout_s: float | None = None
    """Seconds from submission to the end of the request; None is no limit."""
    elapsed_s: float = 0.0
    """Seconds of `timeout_s` that had passed when the request was admitted: its prompt may have waited to be weighed."""

    def with_shares(self, shares: "Shares") -> "Request":
        """Return this request with the automatic weights of its adapters."""
        assert len(shares.weights) == sum(term.is_automatic for term in self.terms)
        weights = iter(shares.weights)
        terms = tuple(replace(term, weight=next(weights)) if term.is_automatic else term for term in self.terms)
        return replace(self, terms=terms, auto=None, base_share=shares.base)

    @property
    def residents(self) -> tuple[tuple[str, ResidentWeight], ...]:
        """Adapters that must be resident while the request runs: digest and weight of each, sorted by digest.

        Summed adapters are listed one by one. Any other merge is one entry, with its own digest and weight 1.
        """
        merged = self.merged_digest
        summed = self.policy if merged else (*self.terms, *self.policy)
        pairs = [(term.digest, term.resident_weight) for term in summed if term.has_weight]
        # As text: a number and a tuple do not compare, and two names may have one digest.
        return tuple(sorted([*pairs, (merged, 1.0)] if merged else pairs, key=str))

    @property
    def merged_digest(self) -> str | None:
        """Digest of the merged adapter built from `terms`; None if the terms are summed or all have weight 0."""
        if self.merge.method == "linear":
            return None
        parts = sorted((term.digest, term.weight) for term in self.terms if term.weight)
        if not parts:
            return None
        content = json.dumps([dict(self.merge.used), parts], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token. `value` is None for the first token of a text, which nothing predicts."""

    token: str
    text_offset: int
    value: float | None
    top: dict[str, float]


@dataclass(frozen=True, slots=True)
class TextEvent:
    """More text, and the log-probabilities of the tokens since the last event.

    The text may be empty, for example while a character is incomplete. With `is_prompt` the text is the echoed prompt and no
    token was generated yet.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    is_prompt: bool = False
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """The time that a choice spent in each phase, in seconds; 0 for a phase that it did not reach."""

    queue: float = 0.0
    """From submission to the first step."""
    prefill: float = 0.0
    """From the first step to the first token."""
    decode: float = 0.0
    """From the first token to the end."""

    @property
    def first_token(self) -> float:
        """Time from submission to the first token."""
        return self.queue + self.prefill

    @property
    def total(self) -> float:
        """Time from submission to the end."""
        return self.queue + self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The last event of a choice that ended well. `num_cached_tokens` of its prompt came from the prefix cache."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    choice: int = 0
    num_cached_tokens: int = 0
    timings: Timings = field(default=Timings(), compare=False)


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The last event of a request that failed inside the engine, for all its choices."""

    message: str
    kind: ErrorKind = "engine"


Event = TextEvent | DoneEvent | ErrorEvent


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One choice of a request inside the engine. The keys and values of its first `num_computed` tokens are in `blocks`."""

    request: Request
    choice: int = 0
    output_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    """Prompt tokens found in the prefix cache when the sequence first ran."""
    num_prefix_tokens: int = 0
    """Tokens found in the prefix cache when the sequence last started to run."""
    num_preemptions: int = 0
    """Number of times the sequence lost its blocks to others and had to be computed again."""
    block_keys: list[bytes] = field(default_factory=list, repr=False)
    """Keys of the sequence's full blocks in the prefix cache, as far as they were needed yet."""
    deadline: float | None = None
    """Time at which the sequence expires, in monotonic seconds."""
    residents: tuple[tuple[str, ResidentWeight], ...] = field(init=False)
    """Same as `request.residents`: the adapters that must be resident while the sequence runs."""
    merged_digest: str | None = field(init=False)
    """Same as `request.merged_digest`: the entry of `residents` that is a merge."""
    priority: int = field(init=False)
    """Priority that all scheduling uses. It is the request's, or for an overdue sequence the highest that was present while it
    waited."""
    is_overdue: bool = False
    """Whether the sequence has waited longer than a lower priority may make it wait."""
    terms: "list[tuple[int, Weight]] | None" = None
    """Slot of each resident adapter, and its weight times the adapter's alpha / r, a number or one for each layer. Set while the
    sequence has acquired its adapters."""

    def __post_init__(self) -> None:
        self.residents, self.merged_digest = self.request.residents, self.request.merged_digest
        self.priority = self.request.priority

    @property
    def is_raised(self) -> bool:
        """Whether the sequence has a higher priority than its request."""
        return self.priority < self.request.priority

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def max_num_tokens(self) -> int:
        """Number of tokens that the sequence can grow to."""
        return len(self.request.prompt_ids) + self.request.max_tokens

    def ids(self, start: int, stop: int) -> list[int]:
        """Return the tokens from `start` to `stop`."""
        num_prompt = len(self.request.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : stop - num_prompt]
        return [*self.request.prompt_ids[start:stop], *self.output_ids[: max(0, stop - num_prompt)]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens from `start` to `stop` of a sequence, which one step computes."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether a token is sampled after this chunk."""
        return self.stop == self.sequence.num_tokens and self.sequence.request.max_tokens > 0
