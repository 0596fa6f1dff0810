"""Requests with grammars beside others: their answers follow the grammar, and they end as they should."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lori.template import encode
from server.engine.adapters.registry import Registry
from server.engine.admission import Admission
from server.engine.generate_request import GenerateRequest, RefusedError
from server.engine.grammar import Grammar
from server.engine.request import ErrorEvent, SamplingParams
from server.engine.sampling import grammars
from tests.server.rig import EOS, Heard, Rig, WatchedRunner, build, scripted

FOX = "The quick brown fox jumps over the lazy dog. "
WARM = SamplingParams(temperature=1.0)
HEX = Grammar("regex", "#[0-9a-f]{6}")
WORDS = Grammar("regex", "[a-z]{3}( [a-z]{3}){4}")


@pytest.fixture(scope="module")
def rig(writer_model: Path, adapters: Path) -> Rig:
    """Return one engine for the whole file, which is idle between tests."""
    return build(writer_model, adapters)


def is_hex(text: str) -> bool:
    return re.fullmatch(HEX.text, text) is not None


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(SamplingParams(), id="greedy"),
        pytest.param(WARM, id="drawn"),
        pytest.param(SamplingParams(temperature=1.5, top_k=40), id="top k"),
        pytest.param(SamplingParams(temperature=1.5, top_p=0.7, min_p=0.01), id="top p and min p"),
        pytest.param(SamplingParams(logit_bias=((48, 100.0), (90, 100.0), (256, 100.0))), id="bias"),
        pytest.param(
            SamplingParams(temperature=1.0, repetition_penalty=3.0, presence_penalty=2.0, frequency_penalty=2.0), id="penalties"
        ),
        pytest.param(SamplingParams(temperature=1.0, min_tokens=4), id="min tokens"),
        pytest.param(SamplingParams(temperature=1e-6, min_tokens=400), id="more tokens than the grammar has"),
    ],
)
def test_an_answer_follows_its_grammar_however_it_is_sampled_and_ends_by_itself(rig: Rig, sampling: SamplingParams) -> None:
    ask = GenerateRequest(prompt=FOX, max_tokens=20, sampling=replace(sampling, grammar=HEX, seed=1))
    for heard in rig.run([replace(ask, sampling=replace(ask.sampling, seed=seed)) for seed in range(5)]):
        assert is_hex(heard.text)
        assert heard.done.finish_reason == "stop"
        assert heard.tokens[-1] == EOS
        assert heard.done.num_completion_tokens == 8


def test_a_bias_chooses_among_the_tokens_that_the_grammar_allows(rig: Rig, tokenizer: PreTrainedTokenizerFast) -> None:
    (seven,) = encode(tokenizer, "7").ids
    (heard,) = rig.run(
        [GenerateRequest(prompt=FOX, max_tokens=20, sampling=SamplingParams(logit_bias=((seven, 100.0),), grammar=HEX))]
    )
    assert heard.text == "#777777"


def test_other_requests_in_the_batch_have_the_answers_that_they_have_alone(rig: Rig) -> None:
    plain = [
        GenerateRequest(prompt=FOX, max_tokens=25, sampling=SamplingParams(num_logprobs=1)),
        GenerateRequest(
            prompt="a", max_tokens=25, adapters=("math",), sampling=SamplingParams(temperature=0.9, top_p=0.9, seed=4)
        ),
        GenerateRequest(prompt=FOX[:9], max_tokens=25, sampling=SamplingParams(repetition_penalty=1.5)),
    ]
    constrained = [
        GenerateRequest(prompt=FOX, max_tokens=25, sampling=replace(WARM, grammar=grammar, seed=2))
        for grammar in (HEX, WORDS, Grammar("json_object"))
    ]
    alone = [rig.run([ask])[0].tokens for ask in [*plain, *constrained]]
    together = rig.run([*plain, *constrained], [0, 3, 1, 2, 0, 5])
    assert [heard.tokens for heard in together] == alone


def test_logprobs_are_the_model_s_own(rig: Rig) -> None:
    """The log-probabilities equal those of the same tokens scored as a prompt, so they do not show the grammar."""
    (heard,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=20, sampling=SamplingParams(grammar=HEX, num_logprobs=2))])
    (echoed,) = rig.run(
        [GenerateRequest(prompt=FOX + heard.text, max_tokens=0, sampling=SamplingParams(echo=True, num_logprobs=2))]
    )
    logprobs = [(one.token, one.value, one.top) for one in heard.logprobs[:7]]
    for (token, value, top), one in zip(logprobs, echoed.logprobs[-7:], strict=True):
        assert token == one.token
        assert value == pytest.approx(one.value, abs=1e-4)
        assert top == pytest.approx(one.top, abs=1e-4)
        assert value is not None
        assert value < 0


def test_max_tokens_cuts_an_answer_short(rig: Rig) -> None:
    (heard,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=4, sampling=SamplingParams(grammar=HEX))])
    assert heard.done.finish_reason == "length"
    assert re.fullmatch("#[0-9a-f]{3}", heard.text)
    (whole,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=8, sampling=SamplingParams(grammar=HEX))])
    assert whole.done.finish_reason == "stop"


def test_a_stop_string_ends_an_answer_with_a_grammar_too(rig: Rig) -> None:
    (heard,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=30, sampling=SamplingParams(grammar=WORDS, stop=(" ",)))])
    assert heard.done.finish_reason == "stop_sequence"
    assert re.fullmatch("[a-z]{3}", heard.text)


def test_the_model_chooses_where_the_grammar_may_end_or_go_on(tokenizer: PreTrainedTokenizerFast) -> None:
    script = [*encode(tokenizer, "aa").ids, *[EOS] * 7]
    ask = GenerateRequest(prompt="x", max_tokens=9, sampling=SamplingParams(grammar=Grammar("regex", "a+")))
    longer = replace(ask, sampling=replace(ask.sampling, min_tokens=5))
    ended, later = scripted(tokenizer, script).run([ask, longer])
    assert (ended.text, ended.done.finish_reason) == ("aa", "stop")
    assert (later.text, later.done.finish_reason) == ("aaaaa", "stop")


def test_min_tokens_does_not_keep_a_grammar_from_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ask = GenerateRequest(prompt="x", max_tokens=9, sampling=SamplingParams(min_tokens=5, grammar=Grammar("regex", "ab?")))
    (heard,) = scripted(tokenizer, []).run([ask])
    assert heard.text == "ab", "the stop token must not be picked while the grammar allows more"
    assert heard.done.finish_reason == "stop"


def test_an_answer_with_a_grammar_may_be_empty(tokenizer: PreTrainedTokenizerFast) -> None:
    (heard,) = scripted(tokenizer, [5]).run(
        [GenerateRequest(prompt="x", max_tokens=3, sampling=SamplingParams(grammar=Grammar("regex", "")))]
    )
    assert (heard.text, heard.done.finish_reason, heard.tokens) == ("", "stop", [EOS])


def test_the_likeliest_allowed_token_is_picked(tokenizer: PreTrainedTokenizerFast) -> None:
    script = encode(tokenizer, "nyes").ids
    (heard,) = scripted(tokenizer, script).run(
        [GenerateRequest(prompt="x", max_tokens=9, sampling=SamplingParams(grammar=Grammar("regex", "yes|no")))]
    )
    assert heard.text == "no"


def test_characters_of_several_bytes_are_written_whole(rig: Rig) -> None:
    (heard,) = rig.run(
        [GenerateRequest(prompt=FOX, max_tokens=40, sampling=replace(WARM, grammar=Grammar("regex", "[é€😀]{5}"), seed=1))]
    )
    assert re.fullmatch("[é€😀]{5}", heard.text)


def run(rig: Rig, ask: GenerateRequest) -> list[Heard]:
    heard = rig.submit_choices(rig.admission.admit(ask))
    rig.finish()
    return heard


def test_each_choice_follows_the_grammar_on_its_own(rig: Rig) -> None:
    ask = GenerateRequest(prompt=FOX, max_tokens=30, sampling=replace(WARM, grammar=WORDS, seed=3))
    heard = run(rig, replace(ask, sampling=replace(ask.sampling, num_choices=5)))
    assert all(re.fullmatch(WORDS.text, one.text) for one in heard)
    assert len({one.text for one in heard}) == 5
    assert run(rig, ask)[0].tokens == heard[0].tokens


def constrained_asks(*num_outputs: int) -> list[GenerateRequest]:
    grammars = [Grammar("regex", f"[a-z ]{{{count}}}") for count in num_outputs]
    return [
        GenerateRequest(
            prompt=FOX,
            max_tokens=60,
            sampling=replace(WARM, grammar=grammar, seed=seed),
            adapters=("math",) * (seed % 2),
        )
        for seed, grammar in enumerate(grammars)
    ]


def test_a_preempted_request_with_a_grammar_has_the_same_answer(writer_model: Path, adapters: Path) -> None:
    asks = constrained_asks(40, 55, 50, 45, 58)
    roomy, tight = build(writer_model, adapters), build(writer_model, adapters, num_blocks=8)
    actual, expected = tight.run(asks), roomy.run(asks)
    assert sum(heard.sequence.num_preemptions > 0 for heard in actual) > 1, "several requests have to be preempted"
    for one, other, ask in zip(actual, expected, asks, strict=True):
        assert one.tokens == other.tokens
        assert ask.sampling.grammar
        assert re.fullmatch(ask.sampling.grammar.text, one.text)
        assert one.done.finish_reason == "stop"


def test_a_prompt_that_is_found_in_the_cache_changes_nothing(writer_model: Path) -> None:
    rig = build(writer_model)
    first, again = (
        rig.run([GenerateRequest(prompt=FOX * 2, max_tokens=40, sampling=replace(WARM, grammar=WORDS, seed=1))])[0]
        for _ in range(2)
    )
    assert again.done.num_cached_tokens > first.done.num_cached_tokens == 0
    assert again.tokens == first.tokens


def test_a_step_that_is_tried_again_advances_the_grammar_once(rig: Rig) -> None:
    """When a request's data breaks a step, its sequences are tried alone, after the masks were computed for all."""
    asks = [GenerateRequest(prompt=FOX, max_tokens=30, sampling=replace(WARM, grammar=WORDS, seed=seed)) for seed in range(3)]
    expected = [heard.tokens for heard in rig.run(asks)]
    picked = rig.engine._executor._sampler.sample
    num_calls = 0

    def pick(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        tokens = picked(*args)
        if num_calls % 5 == 0 and len(args[1]) > 1:
            raise ValueError("after it was picked")
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig.engine._executor._sampler, "sample", pick)
        actual = rig.run(asks)
    assert num_calls > 10
    assert [heard.tokens for heard in actual] == expected


@pytest.mark.parametrize("num_steps", [1, 3, 6])
def test_aborting_a_request_with_a_grammar_frees_all(rig: Rig, num_steps: int) -> None:
    heard = rig.ask(GenerateRequest(prompt=FOX, max_tokens=60, sampling=SamplingParams(grammar=WORDS)))
    for _ in range(num_steps):
        rig.step()
    rig.engine.abort(heard.sequence.request.id)
    rig.finish()
    assert heard.done.finish_reason == "cancelled"


def assert_failed(heard: Heard, pattern: str) -> None:
    last = heard.events[-1]
    assert isinstance(last, ErrorEvent)
    assert last.kind == "grammar"
    assert re.search(pattern, last.message)
    assert sum(isinstance(event, ErrorEvent) for event in heard.events) == 1


def test_a_grammar_that_becomes_too_large_fails_only_its_request(rig: Rig) -> None:
    large = Grammar("regex", "[a-z]{20}((a{1000}){1000}){1000}")  # a trial sees only the beginning of the grammar
    fine = [
        GenerateRequest(prompt=FOX, max_tokens=40, sampling=replace(WARM, seed=1)),
        GenerateRequest(prompt=FOX, max_tokens=40, sampling=SamplingParams(grammar=WORDS)),
    ]
    expected = [rig.run([ask])[0].tokens for ask in fine]
    bad = rig.submit_choices(
        rig.admission.admit(GenerateRequest(prompt=FOX, max_tokens=40, sampling=SamplingParams(grammar=large, num_choices=2)))
    )
    heard = [rig.ask(ask) for ask in fine]
    rig.finish()
    for one in bad:
        assert_failed(one, "the grammar can be followed no further: .*too many")
        assert 10 < len(one.tokens) < 40
    assert [one.tokens for one in heard] == expected


def test_a_grammar_whose_masks_take_too_long_fails_only_its_request(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=10)])
    slow, fine = (
        rig.ask(GenerateRequest(prompt=FOX, max_tokens=40, sampling=SamplingParams(grammar=WORDS))),
        rig.ask(GenerateRequest(prompt=FOX, max_tokens=10)),
    )
    for _ in range(6):
        rig.step()
    monkeypatch.setattr(grammars, "MASK_SECONDS_PER_TOKEN", -1.0)
    rig.finish()
    assert_failed(slow, "too long")
    assert fine.tokens == expected.tokens


def test_a_request_that_forbids_the_tokens_of_its_grammar_fails(rig: Rig) -> None:
    forbidden = SamplingParams(logit_bias=tuple((token, float("-inf")) for token in range(EOS)))
    (heard,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=9, sampling=replace(forbidden, grammar=HEX))])
    assert_failed(heard, "forbids leaves no token")


def test_an_overflow_is_not_reported_as_a_fault_of_the_grammar(rig: Rig) -> None:
    runner = rig.engine._executor.runner
    heard = rig.ask(GenerateRequest(prompt=FOX, max_tokens=9, sampling=SamplingParams(grammar=HEX)))
    WatchedRunner(rig, overflows=lambda _: len(heard.tokens) == 3)
    rig.finish()
    rig.engine._executor.runner = runner
    assert heard.events[-1] == ErrorEvent("the model's numbers overflow under these adapters and weights", "engine")


@pytest.mark.parametrize(
    ("ask", "field", "message"),
    [
        (
            GenerateRequest(prompt="x", sampling=SamplingParams(grammar=Grammar("json_schema", '{"not": {}}'))),
            "grammar",
            'no json_schema .* Unimplemented keys: ."not"',
        ),
        (
            GenerateRequest(prompt="x", sampling=SamplingParams(grammar=Grammar("regex", "(", field="guided_regex"))),
            "guided_regex",
            "unclosed group",
        ),
        (
            GenerateRequest(prompt="x", sampling=SamplingParams(grammar=HEX, ignore_eos=True)),
            "ignore_eos",
            "cannot stand beside grammar",
        ),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_before_it_runs(
    rig: Rig, ask: GenerateRequest, field: str, message: str
) -> None:
    with pytest.raises(RefusedError, match=message) as caught:
        rig.admission.check_grammar(rig.admission.admit(ask).sampling.grammar or HEX)
    assert caught.value.field == field


def test_a_model_that_can_follow_no_grammar_refuses_all(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RefusedError, match="base model cannot"):
        Admission(tokenizer, Registry([]), 100).admit(GenerateRequest(prompt="x", sampling=SamplingParams(grammar=HEX)))
