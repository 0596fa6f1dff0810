"""Admission: every 4xx about a request's content is decided here, before the first byte of a reply. No tensor, no asyncio."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import TypeVar

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lori.errors import TemplateError
from lori.merge_options import DEFAULTS as LINEAR
from lori.merge_options import MergeOptions
from lori.summary import Summary
from lori.template import Message, Template, common_template, encode, render_prompt
from server.engine.adapters.registry import MayUse, PolicyError, Registered, Registry, candidates, resolve
from server.engine.grammar import Grammar, GrammarError
from server.engine.request import AdapterTerm, Request, Sampling
from server.engine.sampling.grammars import Grammars
from server.engine.text import TextBound, TextStream

logger = logging.getLogger(__name__)


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


def decode_with_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Return the text of tokens without special ones, and the position in the text where each token begins, in characters."""
    stream, offsets, pieces = TextStream(tokenizer, ()), [], []
    for token in ids:
        offsets.append(stream.num_characters)
        pieces.append(stream.push(token))
    # The last token may end in an incomplete character, which the stream still holds back.
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    complete = "".join(pieces)
    return complete + text[len(complete) :] if text.startswith(complete) else complete, tuple(offsets)


T = TypeVar("T", int, float)
DEFAULT_MAX_TOKENS = 128
MAX_COUNTED = 2**17
"""Maximum number of tokens of a text that is only tokenized. Listing and freeing more takes over 0.1 s, during which nothing else
runs."""
CAPPED_TOKENS = "the operator's cap for all answers to one request"
MAX_LOGPROBS = 1 << 20
"""Maximum number of log-probabilities in one reply: about 30 MB, which take 0.3 s to write, and 1 s in chats."""


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
class Ask:
    """A request as the client sent it, whatever route it came by."""

    prompt: Prompt
    template: Template | None = None
    adapters: tuple[str, ...] = ()
    """References: `name` or `name@version`."""
    weights: tuple[float, ...] | None = None
    merge: MergeOptions = LINEAR
    may_use: MayUse = lambda _: True
    """Whether the caller may use the adapters of a name."""
    policy: tuple[tuple[str, float], ...] = ()
    """Adapters that the operator adds to every request of this caller: `name` or `name@version`, and weight."""
    max_tokens: int | None = None
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS
    """Limit if `max_tokens` is None and the context has room for it; None allows all the room."""
    sampling: Sampling = field(default_factory=Sampling)
    """Sampling parameters, without the seed."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    grammar: Grammar | None = None
    ignore_eos: bool = False
    num_logprobs: int | None = None
    echo: bool = False
    num_choices: int = 1
    priority: int | None = None
    """Priority; None is 0."""
    tenant: str = ""
    timeout_s: float | None = None
    caps: Caps = Caps()


class Admission:
    """Admission of clients' requests: checks each one and makes a `Request` that the engine can run."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        registry: Registry,
        max_context: int,
        max_terms: int = 1,
        max_nnz: float = inf,
        num_ids: int | None = None,
        grammars: Grammars | None = None,
        max_merge_nnz: float = inf,
    ) -> None:
        """Token ids below `num_ids` are valid; None allows those of the tokenizer."""
        self.tokenizer, self.max_context = tokenizer, max_context
        self._bound = TextBound(tokenizer.backend_tokenizer, max_context)
        self.countable = TextBound(tokenizer.backend_tokenizer, max(MAX_COUNTED, max_context))
        """Bound for texts that are tokenized only to be counted. They may be longer than any prompt."""
        self._registry = registry
        self._num_ids = len(tokenizer) if num_ids is None else num_ids
        self._max_terms = max_terms
        """Maximum number of adapters that can be resident together."""
        self._max_nnz = max_nnz
        """Maximum nonzero entries of B that can be resident. An estimate: exact sizes are known only once adapters are read."""
        self._max_merge_nnz = max_merge_nnz
        """Maximum nonzero entries of B of adapters that are read to be merged into one."""
        self._grammars = grammars
        """The compiled grammars; None if the base model supports none."""

    def knows_grammar(self, grammar: Grammar) -> bool:
        """Return whether the grammar of an admitted request was checked before."""
        return self._grammars is not None and self._grammars.knows(grammar)

    def check_grammar(self, grammar: Grammar, *, is_quick: bool = False) -> bool:
        """Check that an answer can follow the grammar of an admitted request. Raises `RefusedError` if not.

        With `is_quick`, return False if the check takes long. Blocks the calling thread.
        """
        assert self._grammars is not None, "it was admitted"
        try:
            if is_quick:
                return self._grammars.check_quickly(grammar)
            self._grammars.check(grammar)
        except GrammarError as error:
            raise RefusedError(grammar.field, f"is no {grammar.kind} that an answer could follow: {error}") from error
        return True

    def admit(self, ask: Ask) -> Request:
        """Return the request for the engine. Its grammar is checked separately, by `check_grammar`.

        Raises `RefusedError`, `TemplateError`, `PolicyError`, and the errors of `resolve`.
        """
        _check_caps(ask)
        timeout_s = _timeout_s(ask)
        policy_adapters = self._policy_adapters(ask)
        adapters = [adapter.summary for adapter in self._requested_adapters(ask, [adapter for adapter, _ in policy_adapters])]
        policy = [(adapter.summary, weight) for adapter, weight in policy_adapters]
        weights = self._weights(ask, len(adapters))
        template = None
        if not isinstance(ask.prompt, str | TokenPrompt):
            template = ask.template or self.template_of(adapters)
        text, ids, offsets, max_tokens = self._encode(ask, template)
        self._check_merge(ask, adapters, weights, policy)
        self._check_bias(ask.sampling)
        self._check_grammar(ask)
        return Request(
            id=f"gen-{secrets.token_hex(8)}",
            prompt_text=text,
            prompt_ids=ids,
            prompt_offsets=offsets,
            template=template,
            terms=tuple(
                AdapterTerm(adapter.name, adapter.digest, weight) for adapter, weight in zip(adapters, weights, strict=True)
            ),
            merge=ask.merge,
            policy=tuple(AdapterTerm(adapter.name, adapter.digest, weight) for adapter, weight in policy),
            max_tokens=max_tokens,
            sampling=replace(ask.sampling, seed=secrets.randbits(31) if ask.seed is None else ask.seed % 2**64),
            stop=ask.stop,
            include_stop=ask.include_stop,
            grammar=ask.grammar,
            ignore_eos=ask.ignore_eos,
            num_logprobs=ask.num_logprobs,
            echo=ask.echo,
            num_choices=ask.num_choices,
            priority=ask.priority or 0,
            tenant=ask.tenant,
            timeout_s=timeout_s,
        )

    def _encode(self, ask: Ask, template: Template | None) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
        field = "prompt" if isinstance(ask.prompt, str | TokenPrompt) else "messages"
        if isinstance(ask.prompt, TokenPrompt):
            ids = ask.prompt.ids
            max_tokens = self._max_tokens(ask, field, len(ids))
            if min(ids) < 0 or max(ids) >= self._num_ids:
                outside = next(token for token in ids if not 0 <= token < self._num_ids)
                raise RefusedError("prompt", f"has the token {outside}, expected 0 to {self._num_ids - 1}")
            # Text and offsets are needed only for echo.
            text, offsets = decode_with_offsets(self.tokenizer.backend_tokenizer, ids) if ask.echo else ("", ())
            return text, ids, offsets, max_tokens
        text = ask.prompt if isinstance(ask.prompt, str) else ""
        if not isinstance(ask.prompt, str):
            assert template is not None
            text = render_prompt(self.tokenizer, ask.prompt, template)
        if fault := self._bound.fault(text):
            raise RefusedError(field, f"{fault}, and the context holds {self.max_context} with the answer")
        encoding = encode(self.tokenizer, text)
        # The encoding's lists are made only after the length check: those of a long text take seconds.
        max_tokens = self._max_tokens(ask, field, len(encoding))
        offsets = tuple(start for start, _ in encoding.offsets) if ask.echo else ()
        return text, tuple(encoding.ids), offsets, max_tokens

    def _check_merge(
        self, ask: Ask, adapters: Sequence[Summary], weights: Sequence[float], policy: Sequence[tuple[Summary, float]]
    ) -> None:
        bases = {adapter.basis for adapter in adapters}
        is_sum = ask.merge.method == "linear"
        if not is_sum and not adapters:
            raise RefusedError("merge", f"is {ask.merge.method!r} without adapters, which it would merge; expected 'linear'")
        if not is_sum and len(bases) > 1:
            bases_text = "; ".join(f"{adapter.name}: {adapter.basis}" for adapter in adapters)
            raise RefusedError(
                "merge", f"{ask.merge.method} needs adapters on one basis, found {bases_text}; 'linear' needs none"
            )
        num_terms = (len(adapters) if is_sum else min(1, len(adapters))) + len(policy)
        if num_terms > self._max_terms:
            policy_note = f" beside {len(policy)} of the operator's" if policy else ""
            raise RefusedError("adapter", f"names {len(adapters)} adapters{policy_note}, expected at most {self._max_terms}")
        # Merges other than `linear` have fewer nonzero entries than their parts. How many is not known before they are built.
        summed = [*(zip(adapters, weights, strict=True) if is_sum else ()), *policy]
        _check_nnz(summed, self._max_nnz)
        if not is_sum:  # all parts are in memory during the merge, even those of weight 0
            _check_nnz([(adapter, 1.0) for adapter in adapters], self._max_merge_nnz, f" for {ask.merge.method!r}")

    def _check_grammar(self, ask: Ask) -> None:
        if not (grammar := ask.grammar):
            return
        if ask.ignore_eos:
            raise RefusedError("ignore_eos", f"cannot stand beside {grammar.field}, which says where the answer ends")
        if not self._grammars:
            raise RefusedError(grammar.field, "asks for what this base model cannot do: the server's log says why")

    def _check_bias(self, sampling: Sampling) -> None:
        if outside := [token for token, _ in sampling.logit_bias if not 0 <= token < self._num_ids]:
            raise RefusedError("logit_bias", f"names the token {outside[0]}, expected 0 to {self._num_ids - 1}")

    def _requested_adapters(self, ask: Ask, policy_adapters: Sequence[Registered]) -> list[Registered]:
        # A client's weight could cancel the operator's: through another name, or another version.
        names, digests = (
            {name for adapter in policy_adapters for name in adapter.names},
            {adapter.summary.digest for adapter in policy_adapters},
        )
        adapters: list[Registered] = []
        for reference in ask.adapters:
            name = reference.partition("@")[0]
            adapter = None if name in names else resolve(self._registry, reference, ask.may_use)
            if adapter is None or adapter.names & names or adapter.summary.digest in digests:
                raise RefusedError("adapter", f"names {reference!r}, which the operator adds to every request of {ask.tenant!r}")
            if any(
                (adapter.summary.name, adapter.summary.digest) == (other.summary.name, other.summary.digest) for other in adapters
            ):
                raise RefusedError("adapter", f"names {reference!r} twice, expected each adapter once")
            adapters.append(adapter)
        return adapters

    def _policy_adapters(self, ask: Ask) -> list[tuple[Registered, float]]:
        matches = [(candidates(self._registry, reference), weight) for reference, weight in ask.policy]
        if missing := [
            reference for (reference, _), (matching, _) in zip(ask.policy, matches, strict=True) if len(matching) != 1
        ]:
            logger.error("requests of tenant %r fail: its policy names %s, which is not there", ask.tenant, ", ".join(missing))
            raise PolicyError
        return [(matching[0], weight) for matching, weight in matches]

    def _weights(self, ask: Ask, num_adapters: int) -> tuple[float, ...]:
        if ask.weights is None:
            return (1 / num_adapters,) * num_adapters if num_adapters else ()
        if len(ask.weights) != num_adapters:
            raise RefusedError("weights", f"has {len(ask.weights)} numbers, expected {num_adapters}, one for each adapter")
        return ask.weights

    def template_of(self, adapters: Sequence[Summary]) -> Template:
        """Return the chat template for these adapters, or the base model's if there are none. Raises `RefusedError`."""
        try:
            return common_template([(adapter.name, adapter.templates) for adapter in adapters])
        except TemplateError as error:
            raise RefusedError("template", f"is absent, and {error}, expected one here") from error

    def _max_tokens(self, ask: Ask, field: str, num_prompt: int) -> int:
        if not num_prompt:
            raise RefusedError(field, "is empty, expected at least one token")
        room = self.max_context - num_prompt
        # A prompt that is only scored may fill the context. A prompt to be continued must leave room for one token.
        if room < (0 if ask.max_tokens == 0 else 1):
            raise RefusedError(field, f"has {num_prompt} tokens, and the context holds {self.max_context} with the answer")
        if ask.max_tokens is None:
            default = room if ask.default_max_tokens is None else min(ask.default_max_tokens, room)
            return default if ask.caps.max_tokens is None else min(default, ask.caps.max_tokens // ask.num_choices)
        if ask.max_tokens > room:
            raise RefusedError(
                "max_tokens",
                f"{ask.max_tokens} with a prompt of {num_prompt} tokens exceeds the context of {self.max_context}, "
                f"expected at most {room}",
            )
        if not ask.max_tokens and not ask.echo:
            raise RefusedError("max_tokens", "is 0 without echo, so there is nothing to answer; expected at least 1")
        return ask.max_tokens


def check_num_logprobs(requests: Sequence[Request], *, is_whole: bool) -> None:
    """Raise `RefusedError` if one reply to `requests` could exceed `MAX_LOGPROBS`.

    Echoed prompts count always. The longest possible answers count only if `is_whole`: the reply is not streamed.
    """
    scored = [(request, 1 + request.num_logprobs) for request in requests if request.num_logprobs is not None]
    num_prompt = sum(
        request.num_choices * len(request.prompt_ids) * num_per_token for request, num_per_token in scored if request.echo
    )
    num_answer = (
        sum(request.num_choices * request.max_tokens * num_per_token for request, num_per_token in scored) if is_whole else 0
    )
    if num_prompt + num_answer > MAX_LOGPROBS:
        counts = f"these prompts, with echo, and answers, with n and max_tokens, have up to {num_prompt + num_answer} of them"
        hint = "; a stream holds more" if num_prompt <= MAX_LOGPROBS else ""
        raise RefusedError("logprobs", f"{counts}, expected at most {MAX_LOGPROBS} in one reply{hint}")


def _check_caps(ask: Ask) -> None:
    cap = ask.caps.max_tokens
    if cap is None:
        return
    if ask.num_choices > cap:
        raise RefusedError("n", f"is {ask.num_choices}, expected {cap} at most: {CAPPED_TOKENS}")
    if (ask.max_tokens or 0) * ask.num_choices > cap:
        choices_note = f" with n {ask.num_choices}" if ask.num_choices > 1 else ""
        max_each = cap // ask.num_choices
        raise RefusedError("max_tokens", f"is {ask.max_tokens}{choices_note}, expected {max_each} at most: {CAPPED_TOKENS}")


def _timeout_s(ask: Ask) -> float | None:
    cap = ask.caps.max_s
    if cap is not None and ask.timeout_s is not None and ask.timeout_s > cap:
        raise RefusedError("timeout_s", f"is {ask.timeout_s:g}, expected {cap:g} at most: the operator's cap for one request")
    return cap if ask.timeout_s is None else ask.timeout_s


def _smaller(first: T | None, second: T | None) -> T | None:
    return min((value for value in (first, second) if value is not None), default=None)


def _check_nnz(adapters: Sequence[tuple[Summary, float]], max_nnz: float, purpose: str = "") -> None:
    nnz = sum({adapter.digest: adapter.nnz for adapter, weight in adapters if weight}.values())
    if nnz > max_nnz:
        clause = "which keep" if len(adapters) > 1 else "which keeps"
        raise RefusedError(
            "adapter",
            f"names {', '.join(repr(adapter.name) for adapter, _ in adapters)}, {clause} {nnz} entries of B, "
            f"expected at most {int(max_nnz)}{purpose}, for which there is memory (--resident-gib)",
        )
