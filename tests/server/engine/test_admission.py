"""Admission: accepted requests, their defaults, and the message of every refusal."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lori.errors import TemplateError, UnknownAdapterError
from lori.merge_options import MergeOptions
from lori.template import Message, Template
from server.engine.adapters.registry import AmbiguousVersionError, Registry
from server.engine.admission import Admission
from server.engine.generate_request import DEFAULT_MAX_TOKENS, GenerateRequest, RefusedError, TokenPrompt
from server.engine.request import ResidentWeight, SamplingParams
from tests.server.registered import registered
from tests.server.rig import EOS, build

CONTEXT = 200


@pytest.fixture(scope="module")
def registry(writer_model: Path, adapters: Path) -> Registry:
    """Return math (chat), safety (chat, plain) and intent (plain), which is on another basis."""
    return build(writer_model, adapters).registry


@pytest.fixture
def admission(tokenizer: PreTrainedTokenizerFast, registry: Registry) -> Admission:
    return Admission(tokenizer, registry, CONTEXT, max_terms=3)


MESSAGES = (Message(role="system", content="Be brief."), Message(role="user", content="é?"))


def refusal(admission: Admission, ask: GenerateRequest) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        admission.admit(ask)
    assert str(caught.value).startswith(f"{caught.value.field}: ")
    return caught.value


@pytest.mark.parametrize(
    ("ask", "field", "message"),
    [
        pytest.param(
            GenerateRequest(prompt="x", adapters=("math", "safety"), weights=(1.0,)),
            "weights",
            "has 1 weights, expected 2",
            id="few weights",
        ),
        pytest.param(
            GenerateRequest(prompt="x", adapters=("math",), weights=(1.0, 2.0)), "weights", "has 2 weights, expected 1", id="many"
        ),
        pytest.param(
            GenerateRequest(prompt="x", adapters=("math",), weights=()), "weights", "has 0 weights, expected 1", id="no weights"
        ),
        pytest.param(
            GenerateRequest(prompt="x", weights=(1.0,)), "weights", "has 1 weights, expected 0", id="weights of nothing"
        ),
        pytest.param(
            GenerateRequest(prompt="x", adapters=("math", "safety", "math")),
            "adapter",
            "'math' twice, expected each adapter once",
            id="twice",
        ),
        pytest.param(GenerateRequest(prompt=""), "prompt", "is empty, expected at least one token", id="empty prompt"),
        pytest.param(
            GenerateRequest(prompt=(Message(role="user", content=""),), template="plain"),
            "messages",
            "is empty, expected",
            id="empty messages",
        ),
        pytest.param(
            GenerateRequest(prompt="x" * 200),
            "prompt",
            "has 200 tokens, and the context holds 200 with the answer",
            id="long prompt",
        ),
        pytest.param(
            GenerateRequest(prompt="x" * 150, max_tokens=51),
            "max_tokens",
            "51 with a prompt of 150 tokens exceeds the context of 200, expected at most 50",
            id="beyond the context",
        ),
        pytest.param(
            GenerateRequest(prompt="x" * 300, max_tokens=1),
            "prompt",
            "has 300 tokens, and the context holds 200",
            id="prompt beyond the context",
        ),
        pytest.param(GenerateRequest(prompt="x", max_tokens=0), "max_tokens", "is 0 without echo", id="nothing to answer"),
        pytest.param(
            GenerateRequest(prompt=MESSAGES, adapters=("math", "intent")),
            "template",
            "no common template (math: chat; intent: plain), expected one here",
            id="no common template",
        ),
        pytest.param(
            GenerateRequest(prompt="x", merge=MergeOptions("ties")),
            "merge",
            "is 'ties' without adapters",
            id="a merge of nothing",
        ),
        pytest.param(GenerateRequest(prompt=TokenPrompt(())), "prompt", "is empty, expected at least one token", id="no tokens"),
        pytest.param(
            GenerateRequest(prompt=TokenPrompt((5, 257, 999))),
            "prompt",
            "has the token 257, expected 0 to 256",
            id="an unknown token",
        ),
        pytest.param(
            GenerateRequest(prompt=TokenPrompt((-1,))), "prompt", "has the token -1, expected 0 to 256", id="a negative token"
        ),
        pytest.param(
            GenerateRequest(prompt=TokenPrompt((999,) * 200)),
            "prompt",
            "has 200 tokens, and the context holds 200",
            id="many tokens",
        ),
        pytest.param(
            GenerateRequest(prompt="x", sampling=SamplingParams(logit_bias=((5, 1.0), (257, 1.0)))),
            "logit_bias",
            "names the token 257, expected 0 to 256",
            id="bias of an unknown token",
        ),
    ],
)
def test_a_refusal_names_the_field_its_value_and_the_expected_value(
    admission: Admission, ask: GenerateRequest, field: str, message: str
) -> None:
    error = refusal(admission, ask)
    assert error.field == field
    assert message in str(error)


@pytest.mark.parametrize(
    ("name", "near"), [("maths", ("math",)), ("MATH", ("math",)), ("nobody", ()), ("safty", ("safety",)), ("../math", ("math",))]
)
def test_an_unknown_adapter_is_answered_with_near_names(admission: Admission, name: str, near: tuple[str, ...]) -> None:
    with pytest.raises(UnknownAdapterError) as caught:
        admission.admit(GenerateRequest(prompt="x", adapters=("safety", name)))
    assert caught.value.name == name
    assert caught.value.near == near
    assert f"'{name}'" in str(caught.value)
    assert ("did you mean" if near else "known are 'intent', 'math', 'safety'") in str(caught.value)


def test_a_server_without_adapters_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnknownAdapterError, match="there are none at all"):
        Admission(tokenizer, Registry([]), CONTEXT).admit(GenerateRequest(prompt="x", adapters=("math",)))


def test_messages_without_a_chat_template_are_refused(tokenizer: PreTrainedTokenizerFast, registry: Registry) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(TemplateError, match="no chat template"):
        Admission(bare, registry, CONTEXT).admit(GenerateRequest(prompt=MESSAGES))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_are_one_nth_by_default(admission: Admission, registry: Registry, count: int) -> None:
    names = ("intent", "math", "safety")[:count]
    request = admission.admit(GenerateRequest(prompt="x", adapters=names))
    for term, name in zip(request.terms, names, strict=True):
        summary = registry.by_name[name].summary
        assert (term.name, term.digest, term.version) == (name, summary.digest, summary.version)
        assert term.weight == 1 / count
    assert len(request.terms) == count


def test_weights_go_with_their_adapters(admission: Admission) -> None:
    request = admission.admit(GenerateRequest(prompt="x", adapters=("safety", "math"), weights=(0.0, -1.5)))
    assert [(term.name, term.weight) for term in request.terms] == [("safety", 0.0), ("math", -1.5)]


def test_a_request_without_adapters_is_for_the_base(admission: Admission) -> None:
    assert admission.admit(GenerateRequest(prompt="x")).terms == ()


def test_a_prompt_is_taken_as_it_is(admission: Admission) -> None:
    request = admission.admit(GenerateRequest(prompt="aé€😀z", adapters=("math",), sampling=SamplingParams(echo=True)))
    assert request.prompt_text == "aé€😀z"
    assert request.prompt_offsets == (0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4)
    assert len(request.prompt_ids) == len(request.prompt_offsets)


CHAT = "<|system|>Be brief.<|end|><|user|>é?<|end|><|assistant|>"
PLAIN = "Be brief.\né?"


@pytest.mark.parametrize(
    ("names", "template", "text"),
    [
        ((), None, CHAT),
        ((), "plain", PLAIN),
        (("math",), None, CHAT),
        (("intent",), None, PLAIN),
        (("safety",), None, CHAT),  # the adapter's preferred template
        (("safety", "intent"), None, PLAIN),  # the only common template
        (("intent", "safety"), None, PLAIN),
        (("math", "safety"), None, CHAT),
        (("math", "intent"), "plain", PLAIN),  # the requested template
        (("intent",), "chat", CHAT),
    ],
)
def test_messages_are_written_with_the_template_that_the_adapters_share(
    admission: Admission, names: tuple[str, ...], template: Template | None, text: str
) -> None:
    assert admission.admit(GenerateRequest(prompt=MESSAGES, adapters=names, template=template)).prompt_text == text


@pytest.mark.parametrize(("old", "new", "text"), [("plain", "chat", None), ("plain", "plain", PLAIN), ("chat", "chat", CHAT)])
def test_a_template_has_to_be_common_to_both_versions_of_an_adapter(
    tokenizer: PreTrainedTokenizerFast, old: Template, new: Template, text: str | None
) -> None:
    """The version of an adapter that was trained without chat is not given a chat."""
    registry = Registry([registered("math", "1" * 64, templates=(new,))], [registered("math", "2" * 64, templates=(old,))])
    ask = GenerateRequest(prompt=MESSAGES, adapters=("math@1", "math@2"))
    admission = Admission(tokenizer, registry, CONTEXT, max_terms=3)
    if text:
        assert admission.admit(ask).prompt_text == text
    else:
        with pytest.raises(RefusedError, match="no common template"):
            admission.admit(ask)


def test_the_chat_templates_special_tokens_are_one_token_each(admission: Admission) -> None:
    request = admission.admit(GenerateRequest(prompt=(Message(role="user", content="x"),)))
    assert request.prompt_ids.count(EOS) == 1


@pytest.mark.parametrize(("num_prompt", "expected"), [(1, DEFAULT_MAX_TOKENS), (CONTEXT - 128, 128), (CONTEXT - 3, 3)])
def test_max_tokens_is_the_default_or_the_rest_of_the_context(admission: Admission, num_prompt: int, expected: int) -> None:
    assert admission.admit(GenerateRequest(prompt="x" * num_prompt)).max_tokens == expected


def test_prompt_and_answer_may_fill_the_context(admission: Admission) -> None:
    assert admission.admit(GenerateRequest(prompt="x" * 150, max_tokens=50)).max_tokens == 50
    scored = GenerateRequest(prompt="x" * CONTEXT, max_tokens=0, sampling=SamplingParams(echo=True))
    assert admission.admit(scored).max_tokens == 0


def test_every_request_has_an_id_of_its_own(admission: Admission) -> None:
    assert len({admission.admit(GenerateRequest(prompt="x")).id for _ in range(50)}) == 50


def test_more_adapters_than_can_be_resident_together_are_refused(tokenizer: PreTrainedTokenizerFast, registry: Registry) -> None:
    few = Admission(tokenizer, registry, CONTEXT, max_terms=2)
    error = refusal(few, GenerateRequest(prompt="x", adapters=("math", "safety", "intent")))
    assert error.field == "adapter"
    assert "names 3 adapters, expected at most 2" in str(error)
    assert len(few.admit(GenerateRequest(prompt="x", adapters=("math", "safety"))).terms) == 2


def test_the_nnz_of_adapters_is_known_before_they_are_read(writer_model: Path, adapters: Path) -> None:
    rig = build(writer_model, adapters)
    nnz = {name: sum(b.values.numel() for b in adapter.modules.values()) for name, adapter in rig.adapters.items()}
    assert {name: adapter.summary.nnz for name, adapter in rig.registry.by_name.items()} == nnz


def test_adapters_that_do_not_fit_in_memory_together_are_refused(tokenizer: PreTrainedTokenizerFast, registry: Registry) -> None:
    nnz = {name: version.summary.nnz for name, version in registry.by_name.items()}
    both = nnz["math"] + nnz["safety"]
    exact = Admission(tokenizer, registry, CONTEXT, max_terms=3, max_nnz=both)
    assert len(exact.admit(GenerateRequest(prompt="x", adapters=("math", "safety"))).terms) == 2
    small = Admission(tokenizer, registry, CONTEXT, max_terms=3, max_nnz=both - 0.5)
    error = refusal(small, GenerateRequest(prompt="x", adapters=("math", "safety")))
    assert error.field == "adapter"
    assert f"names 'math', 'safety', which keep {both} entries of B, expected at most {both - 1}" in str(error)
    assert len(small.admit(GenerateRequest(prompt="x", adapters=("math",))).terms) == 1
    assert len(small.admit(GenerateRequest(prompt="x", adapters=("math", "safety"), weights=(1.0, 0.0))).residents) == 1
    assert small.admit(GenerateRequest(prompt="x", adapters=("math", "safety"), merge=MergeOptions("ties"))).residents


def test_adapters_of_a_merge_that_do_not_fit_in_memory_are_refused(
    tokenizer: PreTrainedTokenizerFast, registry: Registry
) -> None:
    both = sum(registry.by_name[name].summary.nnz for name in ("math", "safety"))
    ask = GenerateRequest(prompt="x", adapters=("math", "safety"), weights=(1.0, 0.0), merge=MergeOptions("ties"))
    assert Admission(tokenizer, registry, CONTEXT, max_merge_nnz=both).admit(ask).residents
    small = Admission(tokenizer, registry, CONTEXT, max_terms=2, max_merge_nnz=both - 1)
    error = refusal(small, ask)
    assert error.field == "adapter"
    assert f"names 'math', 'safety', which keep {both} entries of B, expected at most {both - 1} for 'ties'" in str(error)
    assert small.admit(replace(ask, merge=MergeOptions())).residents


def test_a_merge_that_is_built_once_takes_one_place_however_many_adapters_it_has(
    tokenizer: PreTrainedTokenizerFast, registry: Registry
) -> None:
    one = Admission(tokenizer, registry, CONTEXT, max_terms=1)
    request = one.admit(GenerateRequest(prompt="x", adapters=("math", "safety"), merge=MergeOptions("ties")))
    assert len(request.residents) == 1
    assert request.residents[0][1] == 1.0


def test_adapters_with_block_weights_are_summed(admission: Admission, registry: Registry) -> None:
    def residents(*block_weights: tuple[float, ...], weights: tuple[float, ...] = (2.0, 1.0)) -> dict[str, ResidentWeight]:
        ask = GenerateRequest(prompt="x", adapters=("math", "intent"), weights=weights, block_weights=block_weights)
        request = admission.admit(ask)
        assert request.merged_digest is None
        names = {registry.by_name[name].summary.digest: name for name in ("math", "intent")}
        return {names[digest]: weight for digest, weight in request.residents}

    assert residents((0.5, 2.0), ()) == {"math": (1.0, 4.0), "intent": 1.0}, "on several bases too"
    assert residents((0.0, 0.0), (1.0, 0.5)) == {"intent": (1.0, 0.5)}
    assert residents((0.5, 2.0), (), weights=(0.0, 1.0)) == {"intent": 1.0}


def test_a_merge_of_adapters_on_several_bases_is_refused_but_for_a_sum(admission: Admission) -> None:
    ask = GenerateRequest(prompt="x", adapters=("math", "intent"), merge=MergeOptions("magnitude"))
    error = refusal(admission, ask)
    assert error.field == "merge"
    for part in ("magnitude needs adapters on one basis", "math: ", "intent: ", "'linear' needs none"):
        assert part in str(error)
    assert len(admission.admit(replace(ask, merge=MergeOptions())).residents) == 2


def test_options_are_passed_to_the_request_unchanged(admission: Admission) -> None:
    sampling = SamplingParams(temperature=0.5, top_k=3, logit_bias=((5, 1.0),), seed=7, stop=("a", "b"), num_choices=4)
    ask = GenerateRequest(prompt="x", sampling=sampling, priority=-1, tenant="they", timeout_s=2.5)
    request = admission.admit(ask)
    assert request.sampling is sampling
    for name in ("priority", "tenant", "timeout_s"):
        assert getattr(request, name) == getattr(ask, name)


@pytest.mark.parametrize("echo", [False, True])
def test_prompt_tokens_are_taken_as_they_are_and_decoded_only_for_echo(admission: Admission, echo: bool) -> None:
    text = admission.admit(GenerateRequest(prompt="aé€😀z", sampling=SamplingParams(echo=echo)))
    request = admission.admit(GenerateRequest(prompt=TokenPrompt(text.prompt_ids), sampling=SamplingParams(echo=echo)))
    assert request.prompt_ids == text.prompt_ids
    assert request.max_tokens == text.max_tokens
    assert len(request.prompt_offsets) == (len(request.prompt_ids) if echo else 0)
    assert request.prompt_offsets == text.prompt_offsets
    if echo:
        assert request.prompt_text == text.prompt_text


def test_tokens_of_the_model_that_the_tokenizer_lacks_may_be_named(
    tokenizer: PreTrainedTokenizerFast, registry: Registry
) -> None:
    """Many models have rows for more tokens than their tokenizers have."""
    padded = Admission(tokenizer, registry, CONTEXT, num_ids=320)
    biased = SamplingParams(logit_bias=((319, 1.0),))
    a, b = padded.admit(GenerateRequest(prompt="ab")).prompt_ids
    request = padded.admit(GenerateRequest(prompt=TokenPrompt((a, 319, b)), sampling=replace(biased, echo=True)))
    assert (request.prompt_ids, request.prompt_text, request.prompt_offsets) == ((a, 319, b), "ab", (0, 1, 1))
    for ask in (
        GenerateRequest(prompt=TokenPrompt((320,))),
        GenerateRequest(prompt="x", sampling=SamplingParams(logit_bias=((320, 1.0),))),
    ):
        assert "token 320, expected 0 to 319" in str(refusal(padded, ask))


VERSIONS = [registered("math", "ab1" + "0" * 61), registered("math", "ab2" + "0" * 61), registered("copy", "ab1" + "0" * 61)]


@pytest.fixture
def versioned(tokenizer: PreTrainedTokenizerFast) -> Admission:
    """Return an admission that knows math in two versions, and another name of the current one."""
    current, old, copy = VERSIONS
    return Admission(tokenizer, Registry([current, copy], [old]), CONTEXT, max_terms=3)


def test_versions_of_one_adapter_may_be_added(versioned: Admission) -> None:
    request = versioned.admit(GenerateRequest(prompt="x", adapters=("math@ab2", "math"), weights=(1.0, -1.0)))
    assert [(term.reference, term.weight) for term in request.terms] == [("math@ab2000000000", 1.0), ("math@ab1000000000", -1.0)]


def test_two_names_of_one_content_may_be_added(versioned: Admission) -> None:
    request = versioned.admit(GenerateRequest(prompt="x", adapters=("math", "copy")))
    assert [term.name for term in request.terms] == ["math", "copy"]


@pytest.mark.parametrize("names", [("math", "math@ab1"), ("math@ab1", "math@ab10"), ("math@ab2", "copy", "math@ab2")])
def test_one_version_is_named_once_however_it_is_named(versioned: Admission, names: tuple[str, ...]) -> None:
    error = refusal(versioned, GenerateRequest(prompt="x", adapters=names))
    assert error.field == "adapter"
    assert f"{names[-1]!r} twice, expected each adapter once" in str(error)


def test_ambiguous_version_digits_are_refused(versioned: Admission) -> None:
    with pytest.raises(AmbiguousVersionError, match="'math@ab' could be math@ab1000000000 or math@ab2000000000"):
        versioned.admit(GenerateRequest(prompt="x", adapters=("math@ab",)))


def test_adapters_that_the_caller_may_not_use_are_unknown(versioned: Admission) -> None:
    ask = GenerateRequest(prompt="x", adapters=("math",), may_use=lambda name: name == "copy")
    with pytest.raises(UnknownAdapterError, match="there is no adapter 'math': known are 'copy'"):
        versioned.admit(ask)
    with pytest.raises(UnknownAdapterError, match="there is no adapter 'math@ab': known are 'copy'"):
        versioned.admit(replace(ask, adapters=("math@ab",)))
    assert versioned.admit(replace(ask, adapters=("copy",))).terms[0].digest == VERSIONS[0].summary.digest
