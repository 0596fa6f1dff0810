"""Admission of requests with automatic weights."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lori.auto_weights import Shares
from lori.merge_options import DefaultMerge, MergeOptions
from lori.prompt_statistics import NUM_FEATURES, Background, PromptStatistics, probed_prompt
from server.engine.adapters.registry import Registered, Registry
from server.engine.admission import Admission
from server.engine.generate_request import GenerateRequest, RefusedError, TokenPrompt
from server.engine.request import RequestedWeight, SamplingParams
from tests.lori.features import spherical
from tests.server.registered import registered
from tests.tiny import tiny_tokenizer

MEAN = np.zeros(NUM_FEATURES, np.float32)
GAUSSIANS = spherical(MEAN)
BACKGROUND = Background("b" * 64, MEAN, np.eye(NUM_FEATURES, dtype=np.float32), GAUSSIANS)
OTHER = replace(BACKGROUND, base_digest="c" * 64)


def calibrated(name: str, digest: str) -> Registered:
    adapter = registered(name, digest)
    statistics = PromptStatistics(digest, BACKGROUND.digest, GAUSSIANS)
    return replace(adapter, summary=replace(adapter.summary, prompt_statistics=statistics))


REFUSING = "{{ raise_exception('no user') }}"
REGISTRY = Registry([calibrated("math", "1" * 64), calibrated("law", "2" * 64), registered("code", "3" * 64)])


def templated(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def admission(
    background: Background | None = BACKGROUND, template: str | None = None, default_merge: DefaultMerge = "linear"
) -> Admission:
    return Admission(templated(template), REGISTRY, 200, max_terms=3, background=background, default_merge=default_merge)


def ask(prompt: str | TokenPrompt = "2+3", *names: str) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, adapters=names or ("math", "law"), weights="auto")


def test_the_request_has_what_its_weights_are_computed_from() -> None:
    request = admission().admit(ask())
    assert request.auto is not None
    assert request.auto.prompt == probed_prompt(admission().tokenizer, "2+3")
    assert [statistics.adapter_digest for statistics in request.auto.statistics] == ["1" * 64, "2" * 64]
    assert [term.weight for term in request.terms] == [0.0, 0.0]


def test_statistics_of_an_extended_background_s_original_count() -> None:
    extended = BACKGROUND.extended([np.random.default_rng(0).standard_normal((100, NUM_FEATURES))])
    request = admission(extended).admit(ask())
    assert request.auto is not None
    assert request.auto.background is extended


@pytest.mark.parametrize("weights", [(-0.5, "auto"), ("auto", -0.5)])
def test_some_weights_are_automatic_beside_given_ones(weights: tuple[RequestedWeight, ...]) -> None:
    names = ("code", "law") if weights[1] == "auto" else ("law", "code")  # `code` has no statistics
    request = admission().admit(replace(ask("2+3", *names), weights=weights))
    assert request.auto is not None
    assert [statistics.adapter_digest for statistics in request.auto.statistics] == ["2" * 64]
    weighed = request.with_shares(Shares((0.75,), 0.25))
    assert {term.name: (term.weight, term.is_automatic) for term in weighed.terms} == {"code": (-0.5, False), "law": (0.75, True)}
    assert (weighed.auto, weighed.base_share) == (None, 0.25)


def test_block_weights_stand_beside_automatic_ones() -> None:
    request = replace(ask("2+3", "code", "law"), weights=(2.0, "auto"), block_weights=((0.5, 1.0), ()))
    weighed = admission().admit(request).with_shares(Shares((0.75,), 0.25))
    assert dict(weighed.residents)["2" * 64] == 0.75
    assert (1.0, 2.0) in dict(weighed.residents).values()


def test_given_weights_count_for_the_memory_of_a_request_with_automatic_ones() -> None:
    request = replace(ask("2+3", "math", "law"), weights=("auto", 0.0))
    room = registered("math", "1" * 64).summary.nnz
    tight = Admission(tiny_tokenizer(), REGISTRY, 200, max_terms=3, max_nnz=room, background=BACKGROUND)
    tight.admit(request)
    with pytest.raises(RefusedError, match="entries of B"):
        tight.admit(replace(request, weights=("auto", 1.0)))


@pytest.mark.parametrize(
    ("admission", "request_", "message"),
    [
        (
            admission(None),
            ask(),
            "no background: make one with python -m training.background, and start the server with --background FILE",
        ),
        (admission(), ask("x", "math", "code"), "'code' has no statistics of its prompts"),
        (admission(), replace(ask("x", "math", "code"), weights=(1.0, "auto")), "'code' has no statistics of its prompts"),
        (admission(), replace(ask(), weights=("auto",)), "has 1 weights, expected 2, one for each adapter"),
        (admission(), replace(ask(), weights=("auto", 1.0), merge=MergeOptions("ties")), "asks for 'auto' with merge 'ties'"),
        (admission(OTHER), ask(), "'math' has statistics of another background of its prompts"),
        (admission(template=REFUSING), ask(), "the chat template refuses these messages: no user"),
        (admission(), ask(TokenPrompt((256,))), "the message has no token"),  # the end of text, which is no text
    ],
)
def test_what_cannot_be_weighed_is_refused(admission: Admission, request_: GenerateRequest, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        admission.admit(request_)
    assert caught.value.field == "weights"
    assert message in str(caught.value)


def test_an_adapter_can_be_weighed_by_the_background_of_its_statistics() -> None:
    math, code = (REGISTRY.by_name[name].summary for name in ("math", "code"))
    assert admission().weights.can_weigh(math)
    assert not any(admission(background).weights.can_weigh(math) for background in (OTHER, None))
    assert not admission().weights.can_weigh(code)


BY_DEFAULT = admission(default_merge="auto")


def test_several_adapters_without_weights_are_weighed_by_default() -> None:
    request = BY_DEFAULT.admit(replace(ask(), weights=None))
    assert request.auto is not None
    assert [statistics.adapter_digest for statistics in request.auto.statistics] == ["1" * 64, "2" * 64]
    assert [term.weight for term in request.terms] == [0.0, 0.0]


def test_a_prompt_without_text_is_weighed_by_the_template_around_it() -> None:
    template = "<{{ messages[0]['content'] }}>"
    request = admission(template=template).admit(ask(TokenPrompt((256,))))
    assert request.auto is not None
    assert request.auto.prompt == probed_prompt(templated(template), "")


@pytest.mark.parametrize(
    ("admission", "request_", "weights"),
    [
        (admission(), replace(ask(), weights=None), [0.5, 0.5]),
        (admission(None, default_merge="auto"), replace(ask(), weights=None), [0.5, 0.5]),
        (admission(OTHER, default_merge="auto"), replace(ask(), weights=None), [0.5, 0.5]),
        (BY_DEFAULT, replace(ask("x", "math", "code"), weights=None), [0.5, 0.5]),
        (BY_DEFAULT, replace(ask(), weights=None, merge=MergeOptions("ties")), [0.5, 0.5]),
        (BY_DEFAULT, replace(ask("x", "math"), weights=None), [1.0]),
        (BY_DEFAULT, replace(ask(TokenPrompt((256,))), weights=None), [0.5, 0.5]),
        (admission(template=REFUSING, default_merge="auto"), replace(ask(), weights=None), [0.5, 0.5]),
        (BY_DEFAULT, replace(ask(), weights=None, sampling=SamplingParams(echo=True)), [0.5, 0.5]),
        (BY_DEFAULT, replace(ask(), weights=(0.25, 2.0)), [0.25, 2.0]),
    ],
    ids=[
        "linear",
        "no background",
        "other background",
        "no statistics",
        "ties",
        "one adapter",
        "no text",
        "refused by the template",
        "scored",
        "given weights",
    ],
)
def test_weights_are_those_given_or_equal_where_they_are_not_automatic(
    admission: Admission, request_: GenerateRequest, weights: list[float]
) -> None:
    request = admission.admit(request_)
    assert request.auto is None
    assert [term.weight for term in request.terms] == weights
