"""Admission: every 4xx about a request's content is decided here, before the first byte of a reply. No tensor, no asyncio."""

import logging
import secrets
from collections.abc import Sequence
from math import inf

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lori.errors import TemplateError
from lori.merge_options import DefaultMerge
from lori.prompt_statistics import Background
from lori.summary import Summary
from lori.template import Template, common_template, encode, render_prompt
from server.engine.adapters.registry import PolicyError, Registered, Registry, candidates, clashes, resolve
from server.engine.generate_request import (
    GenerateRequest,
    RefusedError,
    TokenPrompt,
    check_caps,
    checked_timeout_s,
)
from server.engine.grammar import Grammar, GrammarError
from server.engine.request import AdapterTerm, Request, RequestedWeight, SamplingParams
from server.engine.sampling.grammars import Grammars
from server.engine.text import TextBound, TextStream
from server.engine.weight_resolver import WeightResolver

logger = logging.getLogger(__name__)


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


MAX_COUNTED = 2**17
"""Maximum number of tokens of a text that is only tokenized. Listing and freeing more takes over 0.1 s, during which nothing else
runs."""
MAX_LOGPROBS = 1 << 20
"""Maximum number of log-probabilities in one reply: about 30 MB, which take 0.3 s to write, and 1 s in chats."""


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
        background: Background | None = None,
        default_merge: DefaultMerge = "linear",
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
        self.weights = WeightResolver(tokenizer, background, default_merge)
        """Without a background no weight is automatic."""
        self._grammars = grammars
        """The compiled grammars; None if the base model supports none."""

    def knows_grammar(self, grammar: Grammar) -> bool:
        """Return whether the grammar of an admitted request was checked before."""
        return self._grammars is not None and self._grammars.knows(grammar)

    def check_grammar(self, grammar: Grammar, *, is_quick: bool = False) -> bool:
        """Check that an answer can follow the grammar of an admitted request. Raises `RefusedError` if not.

        With `is_quick`, return False if a short trial does not decide it, see `Grammars`. Blocks the calling thread.
        """
        assert self._grammars is not None, "it was admitted"
        try:
            if is_quick:
                return self._grammars.check_quickly(grammar)
            self._grammars.check(grammar)
        except GrammarError as error:
            raise RefusedError(grammar.field, f"is no {grammar.kind} that an answer could follow: {error}") from error
        return True

    def admit(self, request: GenerateRequest) -> Request:
        """Return the request for the engine. Its grammar is checked separately, by `check_grammar`.

        Raises `RefusedError`, `TemplateError`, `PolicyError`, and the errors of `resolve`.
        """
        check_caps(request)
        timeout_s = checked_timeout_s(request)
        policy_adapters = self._policy_adapters(request)
        adapters = [adapter.summary for adapter in self._requested_adapters(request, [adapter for adapter, _ in policy_adapters])]
        policy = [(adapter.summary, weight) for adapter, weight in policy_adapters]
        assert request.is_sum or not request.block_weights
        template = None
        if not isinstance(request.prompt, str | TokenPrompt):
            template = request.template or self.template_of(adapters)
        text, ids, offsets, max_tokens = self._encode(request, template)
        weights, auto = self.weights.resolve(request, adapters)
        block_weights = request.block_weights or [()] * len(adapters)
        self.check_merge(request, adapters, [1.0 if weight == "auto" else weight for weight in weights], policy)
        self._check_bias(request.sampling)
        self._check_grammar(request.sampling)
        return Request(
            id=f"gen-{secrets.token_hex(8)}",
            prompt_text=text,
            prompt_ids=ids,
            prompt_offsets=offsets,
            template=template,
            terms=tuple(_term(request, *part) for part in zip(adapters, weights, block_weights, strict=True)),
            merge_names=tuple(dict.fromkeys(filter(None, request.merge_of_adapter))),
            merge=request.merge,
            auto=auto,
            base_share=request.base_share,
            policy=tuple(AdapterTerm(adapter.name, adapter.digest, weight) for adapter, weight in policy),
            max_tokens=max_tokens,
            sampling=request.sampling,
            priority=request.priority or 0,
            tenant=request.tenant,
            timeout_s=timeout_s,
        )

    def check_text(self, request: GenerateRequest) -> None:
        """Raise `RefusedError` if a prompt that is no conversation cannot be answered: it is too long, or has unknown tokens."""
        if isinstance(request.prompt, str | TokenPrompt):
            self._encode(request, None)

    def _encode(self, request: GenerateRequest, template: Template | None) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
        field = "prompt" if isinstance(request.prompt, str | TokenPrompt) else "messages"
        if isinstance(request.prompt, TokenPrompt):
            ids = request.prompt.ids
            max_tokens = self._max_tokens(request, field, len(ids))
            if min(ids) < 0 or max(ids) >= self._num_ids:
                outside = next(token for token in ids if not 0 <= token < self._num_ids)
                raise RefusedError("prompt", f"has the token {outside}, expected 0 to {self._num_ids - 1}")
            # Text and offsets are needed only for echo.
            text, offsets = decode_with_offsets(self.tokenizer.backend_tokenizer, ids) if request.sampling.echo else ("", ())
            return text, ids, offsets, max_tokens
        text = request.prompt if isinstance(request.prompt, str) else ""
        if not isinstance(request.prompt, str):
            assert template is not None
            text = render_prompt(self.tokenizer, request.prompt, template)
        if fault := self._bound.fault(text):
            raise RefusedError(field, f"{fault}, and the context holds {self.max_context} with the answer")
        encoding = encode(self.tokenizer, text)
        # The encoding's lists are made only after the length check: those of a long text take seconds.
        max_tokens = self._max_tokens(request, field, len(encoding))
        offsets = tuple(start for start, _ in encoding.offsets) if request.sampling.echo else ()
        return text, tuple(encoding.ids), offsets, max_tokens

    def check_merge(
        self,
        request: GenerateRequest,
        adapters: Sequence[Summary],
        weights: Sequence[float],
        policy: Sequence[tuple[Summary, float]],
    ) -> None:
        """Raise `RefusedError` if these adapters cannot be in one request: by their bases, their number or their memory."""
        bases = {adapter.basis for adapter in adapters}
        method, is_sum = request.merge.method, request.is_sum
        if not is_sum and not adapters:
            raise RefusedError("merge", f"is {request.merge.method!r} without adapters, which it would merge; expected 'linear'")
        if not is_sum and len(bases) > 1:
            bases_text = "; ".join(f"{adapter.name}: {adapter.basis}" for adapter in adapters)
            raise RefusedError("merge", f"{method} needs adapters on one basis, found {bases_text}; 'linear' needs none")
        num_terms = (len(adapters) if is_sum else min(1, len(adapters))) + len(policy)
        if num_terms > self._max_terms:
            policy_note = f" beside {len(policy)} of the operator's" if policy else ""
            raise RefusedError("adapter", f"names {len(adapters)} adapters{policy_note}, expected at most {self._max_terms}")
        # A merge that is built has fewer nonzero entries than its parts. How many is not known before.
        summed = [*(zip(adapters, weights, strict=True) if is_sum else ()), *policy]
        _check_nnz(summed, self._max_nnz)
        if not is_sum:  # all parts are in memory during the merge, even those of weight 0
            _check_nnz([(adapter, 1.0) for adapter in adapters], self._max_merge_nnz, f" for {method!r}")

    def _check_grammar(self, sampling: SamplingParams) -> None:
        if not (grammar := sampling.grammar):
            return
        if sampling.ignore_eos:
            raise RefusedError("ignore_eos", f"cannot stand beside {grammar.field}, which says where the answer ends")
        if not self._grammars:
            raise RefusedError(grammar.field, "asks for what this base model cannot do: the server's log says why")

    def _check_bias(self, sampling: SamplingParams) -> None:
        if outside := [token for token, _ in sampling.logit_bias if not 0 <= token < self._num_ids]:
            raise RefusedError("logit_bias", f"names the token {outside[0]}, expected 0 to {self._num_ids - 1}")

    def _requested_adapters(self, request: GenerateRequest, policy_adapters: Sequence[Registered]) -> list[Registered]:
        # A client's weight could cancel the operator's: through another name, or another version.
        names = {name for adapter in policy_adapters for name in adapter.names}
        adapters: list[Registered] = []
        for number, reference in enumerate(request.adapters):
            name = reference.partition("@")[0]
            adapter = None if name in names else resolve(self._registry, reference, request.may_use)
            if adapter is None or clashes(adapter, policy_adapters):
                raise RefusedError(
                    "adapter", f"names {reference!r}, which the operator adds to every request of {request.tenant!r}"
                )
            if (same := _place_of(adapter, adapters)) is not None:
                raise RefusedError("adapter", f"{_twice(request, same, number)}, expected each adapter once")
            adapters.append(adapter)
        return adapters

    def _policy_adapters(self, request: GenerateRequest) -> list[tuple[Registered, float]]:
        matches = [(candidates(self._registry, reference), weight) for reference, weight in request.policy]
        if missing := [
            reference for (reference, _), (matching, _) in zip(request.policy, matches, strict=True) if len(matching) != 1
        ]:
            logger.error(
                "requests of tenant %r fail: its policy names %s, which is not there", request.tenant, ", ".join(missing)
            )
            raise PolicyError
        return [(matching[0], weight) for matching, weight in matches]

    def template_of(self, adapters: Sequence[Summary]) -> Template:
        """Return the chat template for these adapters, or the base model's if there are none. Raises `RefusedError`."""
        try:
            return common_template([(adapter.name, adapter.templates) for adapter in adapters])
        except TemplateError as error:
            raise RefusedError("template", f"is absent, and {error}, expected one here") from error

    def _max_tokens(self, request: GenerateRequest, field: str, num_prompt: int) -> int:
        if not num_prompt:
            raise RefusedError(field, "is empty, expected at least one token")
        room = self.max_context - num_prompt
        # A prompt that is only scored may fill the context. A prompt to be continued must leave room for one token.
        if room < (0 if request.max_tokens == 0 else 1):
            raise RefusedError(field, f"has {num_prompt} tokens, and the context holds {self.max_context} with the answer")
        if request.max_tokens is None:
            default = room if request.default_max_tokens is None else min(request.default_max_tokens, room)
            cap = request.caps.max_tokens
            return default if cap is None else min(default, cap // request.sampling.num_choices)
        if request.max_tokens > room:
            raise RefusedError(
                "max_tokens",
                f"{request.max_tokens} with a prompt of {num_prompt} tokens exceeds the context of {self.max_context}, "
                f"expected at most {room}",
            )
        if not request.max_tokens and not request.sampling.echo:
            raise RefusedError("max_tokens", "is 0 without echo, so there is nothing to answer; expected at least 1")
        return request.max_tokens


def _place_of(adapter: Registered, adapters: Sequence[Registered]) -> int | None:
    """Return the place of `adapter`, by name and content, among `adapters`, or None."""
    contents = [(other.summary.name, other.summary.digest) for other in adapters]
    content = (adapter.summary.name, adapter.summary.digest)
    return contents.index(content) if content in contents else None


def _twice(request: GenerateRequest, first: int, second: int) -> str:
    """Return what names an adapter twice, at these places among the request's adapters: the client, or merges that it named."""
    reference = request.adapters[second]
    merge, other = (request.merge_of_adapter[place] if request.merge_of_adapter else "" for place in (first, second))
    if merge and other:
        return f"names the merges {merge!r} and {other!r}, which both have {reference!r}"
    if not merge and not other:
        return f"names {reference!r} twice"
    return f"names {request.adapters[second if merge else first]!r} and the merge {merge or other!r}, which has it, too"


def _term(request: GenerateRequest, adapter: Summary, weight: RequestedWeight, block_weights: tuple[float, ...]) -> AdapterTerm:
    # With a base's share the server has selected the adapters, and their weights, by the prompt.
    is_automatic = weight == "auto" or request.base_share is not None
    return AdapterTerm(adapter.name, adapter.digest, 0.0 if weight == "auto" else weight, is_automatic, block_weights)


def check_num_logprobs(requests: Sequence[Request], *, is_whole: bool) -> None:
    """Raise `RefusedError` if one reply to `requests` could exceed `MAX_LOGPROBS`.

    Echoed prompts count always. The longest possible answers count only if `is_whole`: the reply is not streamed.
    """
    num_prompt = num_answer = 0
    for request in requests:
        sampling = request.sampling
        if sampling.num_logprobs is not None:
            num_per_token = sampling.num_choices * (1 + sampling.num_logprobs)
            num_prompt += num_per_token * len(request.prompt_ids) if sampling.echo else 0
            num_answer += num_per_token * request.max_tokens if is_whole else 0
    if num_prompt + num_answer > MAX_LOGPROBS:
        counts = f"these prompts, with echo, and answers, with n and max_tokens, have up to {num_prompt + num_answer} of them"
        hint = "; a stream holds more" if num_prompt <= MAX_LOGPROBS else ""
        raise RefusedError("logprobs", f"{counts}, expected at most {MAX_LOGPROBS} in one reply{hint}")


def _check_nnz(adapters: Sequence[tuple[Summary, float]], max_nnz: float, purpose: str = "") -> None:
    nnz = sum({adapter.digest: adapter.nnz for adapter, weight in adapters if weight}.values())
    if nnz > max_nnz:
        clause = "which keep" if len(adapters) > 1 else "which keeps"
        raise RefusedError(
            "adapter",
            f"names {', '.join(repr(adapter.name) for adapter, _ in adapters)}, {clause} {nnz} entries of B, "
            f"expected at most {int(max_nnz)}{purpose}, for which there is memory (--resident-gib)",
        )
