"""Fields for sampling and merging, which all routes that generate share."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import Field, Tag, model_validator

from lori.merge_options import MAX_ADAPTERS, MergeMethod, MergeOptions
from server.engine.request import RequestedWeight, RequestedWeights, SamplingParams
from server.schemas.fields import (
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
    one_or_many,
)
from server.schemas.grammars import AnyGrammar, GrammarArguments, to_grammar


def _weight_form(value: Any) -> str | None:
    return "auto" if value == "auto" else "number" if isinstance(value, int | float) else None


AnyWeight = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[Weight, Tag("number")],
    forms(_weight_form, "a number, or 'auto'"),
]
"""A weight, or `auto`."""


class WeightedAdapter(Body):
    """An adapter with its weight."""

    name: AdapterName
    """The adapter's name, or `name@version`."""
    weight: AnyWeight
    """The factor of the adapter's delta, or `auto`, to take it from the prompt."""


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


CONVERTED = frozenset({"logit_bias", "seed", "stop", "grammar", "num_choices"})
"""Parameters whose values or names on the wire are not the engine's."""
SHARED = tuple(parameter.name for parameter in fields(SamplingParams) if parameter.name not in CONVERTED)


class SamplingFields(Body):
    """Parameters of sampling, and the limits on an answer."""

    min_tokens: Count = 0
    """The answer does not end by itself before it has this many tokens."""
    temperature: Temperature = 0.0
    """0 takes the likeliest token each time."""
    top_p: TopP = 1.0
    """Draws among the likeliest tokens that together have this probability."""
    top_k: TopK = 0
    """Draws among this many likeliest tokens; 0 or -1: all."""
    min_p: MinP = 0.0
    """Draws among tokens that have at least this share of the likeliest token's probability."""
    repetition_penalty: RepetitionPenalty = 1.0
    """Above 1, tokens of the prompt and the answer become less likely."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens, once for each time that the answer has them."""
    logit_bias: LogitBias | None = None
    """Added to the logits of tokens, by token id."""
    seed: Seed | None = None
    """Seed of the sampling; random if absent, and given in the reply."""
    n: NumChoices = 1
    """The number of answers. The prompt is computed once."""
    stop: Stops | None = None
    """The answer ends before any of these texts."""
    grammar: AnyGrammar | None = None
    """The form of the whole answer: any JSON object, JSON that fits a schema, or text of a regular expression or a grammar."""
    ignore_eos: bool = False
    """The end of text does not end the answer: it has `max_tokens` tokens. For measurements."""
    timeout_s: Annotated[float, Field(gt=0, le=86400)] | None = None
    """The longest that the request may take, in seconds. It is then ended, and answered 504."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    """A lower value runs earlier; the key's own, or 0, if absent. No request comes before its key's own priority."""

    def to_sampling(self) -> SamplingParams:
        """Return the engine's sampling parameters, with a random seed if the body has none.

        A parameter that is a field of the body is taken as it is, unless `CONVERTED` names it. A body that has a parameter under
        another name overrides this method.
        """
        own_fields = type(self).model_fields
        same = {name: getattr(self, name) for name in SHARED if name in own_fields}
        return SamplingParams(
            **same,
            # -100 forbids a token, which is also its effect at OpenAI.
            logit_bias=tuple((int(token), value) for token, value in (self.logit_bias or {}).items()),
            seed=secrets.randbits(31) if self.seed is None else self.seed % 2**64,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            grammar=to_grammar(self.grammar, "grammar"),
            num_choices=self.n,
        )


class SamplingArguments(TypedDict, total=False):
    """`SamplingFields` as keyword arguments of the Python client. Absent ones are not sent: the server has the defaults."""

    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[str, float]
    seed: int
    n: int
    stop: str | Sequence[str]
    grammar: GrammarArguments
    ignore_eos: bool
    timeout_s: float
    priority: int


Weights = Annotated[
    Annotated[Literal["auto"], Tag("one")]
    | Annotated[list[AnyWeight], Field(max_length=MAX_ADAPTERS, fail_fast=True), Tag("many")],
    forms(one_or_many, "a list of weights, or 'auto'"),
]


class MergeFields(Body):
    """Parameters of the merge of adapters."""

    weights: Weights | None = None
    """One weight for each adapter. `auto`: from the prompt; what fits none of them is left to the base. It can stand for all
    weights, or for some of them beside numbers. If absent, several adapters get automatic weights, or 1/n each where these are
    not possible or under `--default-merge linear`."""
    merge: MergeMethod = "linear"
    """The method that merges several adapters: the exact sum, or one that is built once and kept (TIES, DARE, the largest
    entries)."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """For a merge that is no sum: the share of each adapter's kept entries that survives; 0.5 if absent."""
    merge_seed: Seed | None = None
    """Seed of the entries that `dare_linear` and `dare_ties` drop; 0 if absent."""

    @model_validator(mode="after")
    def _sound_merge(self) -> Self:
        if self.density is not None and self.merge == "linear":
            raise ValueError("'density' is for merges that are no sums; 'merge' is 'linear'")
        if self.merge_seed is not None and not MergeOptions(self.merge).is_random:
            raise ValueError(f"'merge_seed' is for 'dare_linear' and 'dare_ties'; 'merge' is {self.merge!r}")
        return self

    def check_weights(self, requested: Adapters | None) -> None:
        """Raise `ValueError` if there are `weights` for adapters that have weights of their own."""
        if (
            self.weights is not None
            and isinstance(requested, list)
            and any(not isinstance(adapter, str) for adapter in requested)
        ):
            raise ValueError("'weights' is for names; these adapters have their weights with them")

    def to_merge(self) -> MergeOptions:
        """Return the options of `lori.merge`."""
        defaults = MergeOptions()
        return MergeOptions(
            self.merge,
            defaults.density if self.density is None else self.density,
            defaults.sign,
            defaults.seed if self.merge_seed is None else self.merge_seed,
        )

    def to_adapters(self, requested: Adapters | None) -> tuple[tuple[str, ...], RequestedWeights]:
        """Return the references and the weights of `requested`, in any of its forms. Without weights the server chooses."""
        adapters = [requested] if isinstance(requested, str) else requested or []
        names = tuple(adapter if isinstance(adapter, str) else adapter.name for adapter in adapters)
        if own_weights := tuple(adapter.weight for adapter in adapters if not isinstance(adapter, str)):
            return names, own_weights
        return names, tuple(self.weights) if isinstance(self.weights, list) else self.weights


class MergeArguments(TypedDict, total=False):
    """`MergeFields` as keyword arguments of the Python client."""

    weights: Sequence[RequestedWeight] | Literal["auto"]
    merge: MergeMethod
    density: float
    merge_seed: int
