"""Accepts or refuses: every 4xx about a request's content is decided here, before the first byte. No tensor, no asyncio."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

from transformers import PreTrainedTokenizerBase

from lori.merge_methods import DEFAULTS as LINEAR
from lori.merge_methods import MergeOptions
from lori.summary import Summary
from lori.template import Message, Template, encode, render_prompt
from server.access.caller import Caller
from server.access.policy import choose
from server.engine.adapters.registry import Registry
from server.engine.request import AdapterTerm, Request, Sampling

DEFAULT_MAX_TOKENS = 128


class RefusedError(Exception):
    """A request asks for what cannot be: names the field, what was found and what was expected."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(f"{field}: {message}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request as a client means it, whatever route it came by."""

    prompt: str | Sequence[Message]
    template: Template | None = None
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    merge: MergeOptions = LINEAR
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    """But for its seed."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    echo: bool = False
    num_choices: int = 1
    priority: int = 0
    tenant: str = ""
    caller: Caller = field(default_factory=Caller)
    """What it may name, and what is added to what it names."""
    timeout_s: float | None = None


class Admission:
    """Turns what clients ask into requests that the engine can run."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, registry: Registry, max_context: int, max_terms: int = 1, max_kept: float = inf
    ) -> None:
        self._tokenizer, self._registry, self._max_context = tokenizer, registry, max_context
        self._max_terms = max_terms
        """Adapters that can be resident together."""
        self._max_kept = max_kept
        """Entries of B that can be, at most: the adapters' exact sizes are known when they were read."""

    def admit(self, ask: Ask) -> Request:
        """Returns the request. Raises `RefusedError`, `TemplateError`, or as `choose`."""
        adapters, policy = choose(ask.caller, self._once(ask.adapters), self._registry.summary, self._registry.by_name)
        # What is added is as heavy as the operator says, and does not choose how messages are written.
        terms = [*zip(adapters, self._weights(ask, len(adapters)), strict=True), *policy]
        field = "prompt" if isinstance(ask.prompt, str) else "messages"
        if isinstance(ask.prompt, str):
            text = ask.prompt
        else:
            text = render_prompt(self._tokenizer, ask.prompt, ask.template or self._template(adapters))
        encoding = encode(self._tokenizer, text)
        # Its lists are made only of what is not refused: a long text's would take seconds.
        if not len(encoding):
            raise RefusedError(field, "is empty, expected at least one token")
        max_tokens = self._max_tokens(ask, field, len(encoding))
        self._check_merge(ask, [of for of, _ in terms], [weight for _, weight in terms], has_policy=bool(policy))
        return Request(
            id=f"gen-{secrets.token_hex(8)}",
            prompt_text=text,
            prompt_ids=tuple(encoding.ids),
            prompt_offsets=tuple(start for start, _ in encoding.offsets),
            terms=tuple(AdapterTerm(of.name, of.digest, weight) for of, weight in terms),
            merge=ask.merge,
            max_tokens=max_tokens,
            sampling=replace(ask.sampling, seed=secrets.randbits(31) if ask.seed is None else ask.seed),
            stop=ask.stop,
            ignore_eos=ask.ignore_eos,
            num_logprobs=ask.num_logprobs,
            echo=ask.echo,
            num_choices=ask.num_choices,
            priority=ask.priority,
            tenant=ask.tenant,
            timeout_s=ask.timeout_s,
        )

    def _check_merge(self, ask: Ask, adapters: Sequence[Summary], weights: Sequence[float], has_policy: bool) -> None:
        if ask.merge.method != "linear" and has_policy:
            said = f"{ask.merge.method} would cut down what the operator adds to every request of {ask.tenant!r}"
            raise RefusedError("merge", f"{said}, expected 'linear'")
        bases = {of.basis for of in adapters}
        if ask.merge.method != "linear" and len(bases) > 1:
            said = "; ".join(f"{of.name}: {of.basis}" for of in adapters)
            raise RefusedError("merge", f"{ask.merge.method} needs adapters on one basis, found {said}; 'linear' needs none")
        if ask.merge.method == "linear" and len(adapters) > self._max_terms:
            raise RefusedError("adapter", f"names {len(adapters)} adapters, expected at most {self._max_terms}")
        # Merges that are no sums keep fewer entries than their parts; how many is not known before.
        num_kept = sum({of.digest: of.num_kept for of, weight in zip(adapters, weights, strict=True) if weight}.values())
        if ask.merge.method == "linear" and num_kept > self._max_kept:
            said = "which keep" if len(adapters) > 1 else "which keeps"
            raise RefusedError(
                "adapter",
                f"names {', '.join(repr(of.name) for of in adapters)}, {said} {num_kept} entries of B, "
                f"expected at most {int(self._max_kept)}, for which there is memory (--resident-gib)",
            )

    def _once(self, names: Sequence[str]) -> Sequence[str]:
        for place, name in enumerate(names):
            if name in names[:place]:
                raise RefusedError("adapter", f"names {name!r} twice, expected each adapter once")
        return names

    def _weights(self, ask: Ask, num_adapters: int) -> tuple[float, ...]:
        if ask.weights is None:
            return (1 / num_adapters,) * num_adapters if num_adapters else ()
        if len(ask.weights) != num_adapters:
            raise RefusedError("weights", f"has {len(ask.weights)} numbers, expected {num_adapters}, one for each adapter")
        return ask.weights

    def _template(self, adapters: Sequence[Summary]) -> Template:
        if not adapters:
            return "chat"
        learnt = {adapter.name: adapter.templates for adapter in adapters}
        for template in learnt[adapters[0].name]:
            if all(template in templates for templates in learnt.values()):
                return template
        said = "; ".join(f"{name}: {', '.join(templates)}" for name, templates in learnt.items())
        raise RefusedError("template", f"these adapters were trained on no common template ({said}), expected one here")

    def _max_tokens(self, ask: Ask, field: str, num_prompt: int) -> int:
        room = self._max_context - num_prompt
        # A prompt that only scores may fill the context; one that is to be continued must leave room for a token.
        if room < (0 if ask.max_tokens == 0 else 1):
            raise RefusedError(field, f"has {num_prompt} tokens, and the context holds {self._max_context} with the answer")
        if ask.max_tokens is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if ask.max_tokens > room:
            raise RefusedError(
                "max_tokens",
                f"{ask.max_tokens} with a prompt of {num_prompt} tokens exceeds the context of {self._max_context}, "
                f"expected at most {room}",
            )
        if not ask.max_tokens and not ask.echo:
            raise RefusedError("max_tokens", "is 0 without echo, so there is nothing to answer; expected at least 1")
        return ask.max_tokens
