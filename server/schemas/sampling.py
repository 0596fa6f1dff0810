"""What bodies say of how tokens are picked and adapters are merged, in every route that generates."""

from typing import Annotated, Any, Self

from pydantic import Field, Tag, model_validator

from lori.merge_options import MergeMethod, MergeOptions
from server.engine.request import Sampling
from server.schemas.fields import (
    MAX_ADAPTERS,
    AdapterName,
    Body,
    Count,
    LogitBias,
    MinP,
    NumChoices,
    Penalty,
    RepetitionPenalty,
    Seed,
    Stops,
    Temperature,
    TopK,
    TopP,
    Weight,
    forms,
)
from server.schemas.grammars import AnyGrammar


class WeightedAdapter(Body):
    """An adapter with its weight."""

    name: AdapterName
    """Its name, or `name@version`."""
    weight: Weight
    """What its delta is multiplied with."""


def _form(value: Any) -> str | None:
    if not isinstance(value, list):
        return "one" if isinstance(value, str) else None
    return "objects" if value and isinstance(value[0], dict) else "texts"


Adapters = Annotated[
    Annotated[AdapterName, Tag("one")]
    | Annotated[list[AdapterName], Field(max_length=MAX_ADAPTERS, fail_fast=True), Tag("texts")]
    | Annotated[list[WeightedAdapter], Field(min_length=1, max_length=MAX_ADAPTERS, fail_fast=True), Tag("objects")],
    forms(_form, "an adapter's name, a list of names, or a list of objects with name and weight"),
]


class SamplingFields(Body):
    """How tokens are picked, and how long that may take."""

    min_tokens: Count = 0
    """Before so many tokens the answer does not end by itself."""
    temperature: Temperature = 0.0
    """0 takes the likeliest token each time."""
    top_p: TopP = 1.0
    """Draws among the likeliest tokens that together have this probability."""
    top_k: TopK = 0
    """Draws among this many likeliest tokens; 0 or -1: all."""
    min_p: MinP = 0.0
    """Draws among tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: RepetitionPenalty = 1.0
    """Above 1, tokens of the prompt and the answer become less likely."""
    presence_penalty: Penalty = 0.0
    """Taken off the logits of tokens that the answer has."""
    frequency_penalty: Penalty = 0.0
    """Taken off the logits of tokens, as often as the answer has them."""
    logit_bias: LogitBias | None = None
    """Added to the logits of tokens, by id."""
    seed: Seed | None = None
    """Draws the tokens; absent: a random one, named in the reply."""
    n: NumChoices = 1
    """Answers to the prompt, which is computed once."""
    stop: Stops | None = None
    """The answer ends before any of these."""
    grammar: AnyGrammar | None = None
    """What the whole answer has to be: any JSON object, JSON of a schema, or text of a regular expression or a grammar."""
    ignore_eos: bool = False
    """The end of text does not end the answer: it has `max_tokens` tokens, to measure with."""
    timeout_s: Annotated[float, Field(gt=0, le=86400)] | None = None
    """The request is given up, and answered 504, if it takes longer, in seconds."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    """Lower runs earlier; absent: the key's own, or 0. No request comes before its key's own."""

    def to_sampling(self) -> Sampling:
        """Return it as the engine has it, but for the seed."""
        return Sampling(
            # -100 forbids a token, as OpenAI's does in effect.
            logit_bias=tuple((int(token), value) for token, value in (self.logit_bias or {}).items()),
            min_tokens=self.min_tokens,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
        )

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class MergeFields(Body):
    """How adapters are merged."""

    weights: Annotated[list[Weight], Field(max_length=MAX_ADAPTERS, fail_fast=True)] | None = None
    """One for each adapter; absent: each 1/n."""
    merge: MergeMethod = "linear"
    """How several adapters become one: the exact sum, or what is built once and kept (TIES, DARE, the largest entries)."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """For a merge that is no sum: the share of each adapter's kept entries that survives; absent: 0.5."""
    merge_seed: Seed | None = None
    """Of the entries that `dare_linear` and `dare_ties` drop; absent: 0."""

    @model_validator(mode="after")
    def _sound_merge(self) -> Self:
        if self.density is not None and self.merge == "linear":
            raise ValueError("'density' is for merges that are no sums; 'merge' is 'linear'")
        if self.merge_seed is not None and self.merge not in ("dare_linear", "dare_ties"):
            raise ValueError(f"'merge_seed' is for 'dare_linear' and 'dare_ties'; 'merge' is {self.merge!r}")
        return self

    def check_weights(self, asked: Adapters | None) -> None:
        """Raise `ValueError` where there are `weights` for adapters that have theirs with them."""
        if self.weights is not None and isinstance(asked, list) and any(not isinstance(of, str) for of in asked):
            raise ValueError("'weights' is for names; these adapters have their weights with them")

    def to_merge(self) -> MergeOptions:
        """Return it as `lori.merge` has it."""
        defaults = MergeOptions()
        return MergeOptions(
            self.merge,
            defaults.density if self.density is None else self.density,
            defaults.sign,
            defaults.seed if self.merge_seed is None else self.merge_seed,
        )

    def to_adapters(self, asked: Adapters | None) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
        """Return the references and the weights of what is asked for in one of its forms; no weights are each 1/n."""
        several = [asked] if isinstance(asked, str) else asked or []
        names = tuple(of if isinstance(of, str) else of.name for of in several)
        if own := tuple(of.weight for of in several if not isinstance(of, str)):
            return names, own
        return names, None if self.weights is None else tuple(self.weights)
