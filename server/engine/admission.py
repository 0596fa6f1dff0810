"""Accepts or refuses: every 4xx about a request's content is decided here, before the first byte. No tensor, no asyncio."""

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
from server.engine.adapters.registry import MayUse, PolicyError, Registered, Registry, meanings, resolve
from server.engine.grammar import Grammar, GrammarError
from server.engine.request import AdapterTerm, Request, Sampling
from server.engine.sampling.grammars import Grammars
from server.engine.text import TextBound, TextStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt whose tokens the client names."""

    ids: tuple[int, ...]


Prompt = str | Sequence[Message] | TokenPrompt
"""Text as it stands, a conversation, or tokens."""


def size_of(prompt: Prompt) -> int:
    """Return how much there is of a prompt, in characters or tokens."""
    if isinstance(prompt, str | TokenPrompt):
        return len(prompt if isinstance(prompt, str) else prompt.ids)
    return sum(len(message.content) for message in prompt)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Return the text of tokens, special ones left out, and where in it each of them begins, in characters."""
    stream, offsets, pieces = TextStream(tokenizer, ()), [], []
    for token in ids:
        offsets.append(stream.num_characters)
        pieces.append(stream.push(token))
    # The last may be half a character, which waits for what never comes.
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    sure = "".join(pieces)
    return sure + text[len(sure) :] if text.startswith(sure) else sure, tuple(offsets)


T = TypeVar("T", int, float)
DEFAULT_MAX_TOKENS = 128
MAX_COUNTED = 2**17
"""Tokens of a text that is only tokenized: more take a tenth of a second to list and to free, in which nothing else runs."""
CAPPED_TOKENS = "the operator's cap for all answers to one request"
MAX_SCORES = 1 << 20
"""Log-probabilities in one reply: about 30 MB, which take a third of a second to write, and in chats three times as much."""


class RefusedError(Exception):
    """A request asks for what cannot be: names the field, what was found and what was expected."""

    def __init__(self, field: str, message: str) -> None:
        self.field, self.message = field, message
        super().__init__(f"{field}: {message}")


@dataclass(frozen=True, slots=True)
class Caps:
    """What the operator allows one request; None: anything."""

    max_s: float | None = None
    """From its submission to its end, in seconds: the longest `timeout_s`, and that of a request that names none."""
    max_tokens: int | None = None
    """Of all its answers together."""

    def lowered(self, max_s: float | None, max_tokens: int | None) -> "Caps":
        """Return these caps, or what is less."""
        return Caps(_least(self.max_s, max_s), _least(self.max_tokens, max_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request as a client means it, whatever route it came by."""

    prompt: Prompt
    template: Template | None = None
    adapters: tuple[str, ...] = ()
    """Each a name or `name@version`."""
    weights: tuple[float, ...] | None = None
    merge: MergeOptions = LINEAR
    may_use: MayUse = lambda _: True
    """Whether the caller may use the adapters of a name."""
    policy: tuple[tuple[str, float], ...] = ()
    """What the operator adds to the caller's every request: name or `name@version`, and weight."""
    max_tokens: int | None = None
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS
    """Where `max_tokens` is None, if the context has room for them; None: all that it has room for."""
    sampling: Sampling = field(default_factory=Sampling)
    """But for its seed."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    grammar: Grammar | None = None
    ignore_eos: bool = False
    num_logprobs: int | None = None
    echo: bool = False
    num_choices: int = 1
    priority: int | None = None
    """None: 0."""
    tenant: str = ""
    timeout_s: float | None = None
    caps: Caps = Caps()


class Admission:
    """Turns what clients ask into requests that the engine can run."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        registry: Registry,
        max_context: int,
        max_terms: int = 1,
        max_kept: float = inf,
        num_ids: int | None = None,
        grammars: Grammars | None = None,
        max_merged: float = inf,
    ) -> None:
        """`num_ids`: tokens below it are known to the model; None: those of the tokenizer."""
        self.tokenizer, self.max_context = tokenizer, max_context
        self._bound = TextBound(tokenizer.backend_tokenizer, max_context)
        self.countable = TextBound(tokenizer.backend_tokenizer, max(MAX_COUNTED, max_context))
        """Texts that are tokenized only to be counted, which may be longer than any prompt."""
        self._registry = registry
        self._num_ids = len(tokenizer) if num_ids is None else num_ids
        self._max_terms = max_terms
        """Adapters that can be resident together."""
        self._max_kept = max_kept
        """Entries of B that can be, at most: the adapters' exact sizes are known when they were read."""
        self._max_merged = max_merged
        """The same of adapters that are read to be merged into one."""
        self._grammars = grammars
        """None where the base model can follow none."""

    def knows_grammar(self, grammar: Grammar) -> bool:
        """Return whether the grammar of an admitted request was checked before."""
        return self._grammars is not None and self._grammars.knows(grammar)

    def check_grammar(self, grammar: Grammar, *, is_quick: bool = False) -> bool:
        """Make sure that an answer can follow the grammar of an admitted request; `is_quick`: return False where that takes long.

        Blocks its thread. Raises `RefusedError`.
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
        """Return the request; whether its grammar can be followed is for `check_grammar` to say.

        Raises `RefusedError`, `TemplateError`, what `resolve` does, or `PolicyError`.
        """
        _check_caps(ask)
        timeout_s = _timeout_s(ask)
        added = self._added(ask)
        adapters = [of.summary for of in self._find(ask, [of for of, _ in added])]
        policy = [(of.summary, weight) for of, weight in added]
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
            terms=tuple(AdapterTerm(of.name, of.digest, weight) for of, weight in zip(adapters, weights, strict=True)),
            merge=ask.merge,
            policy=tuple(AdapterTerm(of.name, of.digest, weight) for of, weight in policy),
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
            # Only who sees the prompt again needs its text and offsets.
            text, offsets = text_of(self.tokenizer.backend_tokenizer, ids) if ask.echo else ("", ())
            return text, ids, offsets, max_tokens
        text = ask.prompt if isinstance(ask.prompt, str) else ""
        if not isinstance(ask.prompt, str):
            assert template is not None
            text = render_prompt(self.tokenizer, ask.prompt, template)
        if fault := self._bound.fault(text):
            raise RefusedError(field, f"{fault}, and the context holds {self.max_context} with the answer")
        encoding = encode(self.tokenizer, text)
        # Its lists are made only of what is not refused: a long text's would take seconds.
        max_tokens = self._max_tokens(ask, field, len(encoding))
        offsets = tuple(start for start, _ in encoding.offsets) if ask.echo else ()
        return text, tuple(encoding.ids), offsets, max_tokens

    def _check_merge(
        self, ask: Ask, adapters: Sequence[Summary], weights: Sequence[float], policy: Sequence[tuple[Summary, float]]
    ) -> None:
        bases = {of.basis for of in adapters}
        is_sum = ask.merge.method == "linear"
        if not is_sum and not adapters:
            raise RefusedError("merge", f"is {ask.merge.method!r} without adapters, which it would merge; expected 'linear'")
        if not is_sum and len(bases) > 1:
            said = "; ".join(f"{of.name}: {of.basis}" for of in adapters)
            raise RefusedError("merge", f"{ask.merge.method} needs adapters on one basis, found {said}; 'linear' needs none")
        num_terms = (len(adapters) if is_sum else min(1, len(adapters))) + len(policy)
        if num_terms > self._max_terms:
            beside = f" beside {len(policy)} of the operator's" if policy else ""
            raise RefusedError("adapter", f"names {len(adapters)} adapters{beside}, expected at most {self._max_terms}")
        # Merges that are no sums keep fewer entries than their parts; how many is not known before.
        summed = [*(zip(adapters, weights, strict=True) if is_sum else ()), *policy]
        _check_kept(summed, self._max_kept)
        if not is_sum:  # all are in memory while they are merged, those of weight 0 too
            _check_kept([(of, 1.0) for of in adapters], self._max_merged, f" for {ask.merge.method!r}")

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

    def _find(self, ask: Ask, added: Sequence[Registered]) -> list[Registered]:
        # A weight of the client's could take the operator's back: by another name, or of another version.
        names, digests = {name for of in added for name in of.names}, {of.summary.digest for of in added}
        found: list[Registered] = []
        for reference in ask.adapters:
            name = reference.partition("@")[0]
            of = None if name in names else resolve(self._registry, reference, ask.may_use)
            if of is None or of.names & names or of.summary.digest in digests:
                raise RefusedError("adapter", f"names {reference!r}, which the operator adds to every request of {ask.tenant!r}")
            if any((of.summary.name, of.summary.digest) == (other.summary.name, other.summary.digest) for other in found):
                raise RefusedError("adapter", f"names {reference!r} twice, expected each adapter once")
            found.append(of)
        return found

    def _added(self, ask: Ask) -> list[tuple[Registered, float]]:
        found = [(meanings(self._registry, reference), weight) for reference, weight in ask.policy]
        if missing := [reference for (reference, _), (of, _) in zip(ask.policy, found, strict=True) if len(of) != 1]:
            logger.error("requests of tenant %r fail: its policy names %s, which is not there", ask.tenant, ", ".join(missing))
            raise PolicyError
        return [(of[0], weight) for of, weight in found]

    def _weights(self, ask: Ask, num_adapters: int) -> tuple[float, ...]:
        if ask.weights is None:
            return (1 / num_adapters,) * num_adapters if num_adapters else ()
        if len(ask.weights) != num_adapters:
            raise RefusedError("weights", f"has {len(ask.weights)} numbers, expected {num_adapters}, one for each adapter")
        return ask.weights

    def template_of(self, adapters: Sequence[Summary]) -> Template:
        """Return how a conversation is written for these adapters; for none as for the base. Raises `RefusedError`."""
        try:
            return common_template([(adapter.name, adapter.templates) for adapter in adapters])
        except TemplateError as error:
            raise RefusedError("template", f"is absent, and {error}, expected one here") from error

    def _max_tokens(self, ask: Ask, field: str, num_prompt: int) -> int:
        if not num_prompt:
            raise RefusedError(field, "is empty, expected at least one token")
        room = self.max_context - num_prompt
        # A prompt that only scores may fill the context; one that is to be continued must leave room for a token.
        if room < (0 if ask.max_tokens == 0 else 1):
            raise RefusedError(field, f"has {num_prompt} tokens, and the context holds {self.max_context} with the answer")
        if ask.max_tokens is None:
            most = room if ask.default_max_tokens is None else min(ask.default_max_tokens, room)
            return most if ask.caps.max_tokens is None else min(most, ask.caps.max_tokens // ask.num_choices)
        if ask.max_tokens > room:
            raise RefusedError(
                "max_tokens",
                f"{ask.max_tokens} with a prompt of {num_prompt} tokens exceeds the context of {self.max_context}, "
                f"expected at most {room}",
            )
        if not ask.max_tokens and not ask.echo:
            raise RefusedError("max_tokens", "is 0 without echo, so there is nothing to answer; expected at least 1")
        return ask.max_tokens


def check_scores(requests: Sequence[Request], *, is_whole: bool) -> None:
    """Raise `RefusedError` where what is answered in one reply may have more log-probabilities than one can hold.

    Those of echoed prompts; and `is_whole`, where nothing is streamed, those of the longest answers, too.
    """
    scored = [(of, 1 + of.num_logprobs) for of in requests if of.num_logprobs is not None]
    num_prompt = sum(of.num_choices * len(of.prompt_ids) * num_each for of, num_each in scored if of.echo)
    num_answer = sum(of.num_choices * of.max_tokens * num_each for of, num_each in scored) if is_whole else 0
    if num_prompt + num_answer > MAX_SCORES:
        found = f"these prompts, with echo, and answers, with n and max_tokens, have up to {num_prompt + num_answer} of them"
        hint = "; a stream holds more" if num_prompt <= MAX_SCORES else ""
        raise RefusedError("logprobs", f"{found}, expected at most {MAX_SCORES} in one reply{hint}")


def _check_caps(ask: Ask) -> None:
    cap = ask.caps.max_tokens
    if cap is None:
        return
    if ask.num_choices > cap:
        raise RefusedError("n", f"is {ask.num_choices}, expected {cap} at most: {CAPPED_TOKENS}")
    if (ask.max_tokens or 0) * ask.num_choices > cap:
        beside = f" with n {ask.num_choices}" if ask.num_choices > 1 else ""
        most = cap // ask.num_choices
        raise RefusedError("max_tokens", f"is {ask.max_tokens}{beside}, expected {most} at most: {CAPPED_TOKENS}")


def _timeout_s(ask: Ask) -> float | None:
    cap = ask.caps.max_s
    if cap is not None and ask.timeout_s is not None and ask.timeout_s > cap:
        raise RefusedError("timeout_s", f"is {ask.timeout_s:g}, expected {cap:g} at most: the operator's cap for one request")
    return cap if ask.timeout_s is None else ask.timeout_s


def _least(one: T | None, other: T | None) -> T | None:
    return min((value for value in (one, other) if value is not None), default=None)


def _check_kept(adapters: Sequence[tuple[Summary, float]], most: float, what_for: str = "") -> None:
    num_kept = sum({of.digest: of.num_kept for of, weight in adapters if weight}.values())
    if num_kept > most:
        said = "which keep" if len(adapters) > 1 else "which keeps"
        raise RefusedError(
            "adapter",
            f"names {', '.join(repr(of.name) for of, _ in adapters)}, {said} {num_kept} entries of B, "
            f"expected at most {int(most)}{what_for}, for which there is memory (--resident-gib)",
        )
