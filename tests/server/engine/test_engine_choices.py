"""Several choices of one request: their prompt is computed once, and they end, fail and are aborted together or apart."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.generate_request import GenerateRequest
from server.engine.request import DoneEvent, ErrorEvent, SamplingParams, TextEvent
from server.engine.text import token_text
from tests.server.rig import EOS, Heard, Rig, WatchedRunner, build, scripted

FOX = "The quick brown fox jumps over the lazy dog. "
WARM = SamplingParams(temperature=1.0, top_k=12)
"""The 12 likeliest tokens of the model are characters."""


@pytest.fixture(scope="module")
def rig(writer_model: Path, adapters: Path) -> Rig:
    """Return one engine for the whole file, which is idle between tests."""
    return build(writer_model, adapters)


def run(rig: Rig, ask: GenerateRequest) -> list[Heard]:
    """Run a request, and return the events of each choice."""
    heard = rig.submit_choices(rig.admission.admit(ask))
    rig.finish()
    return heard


def values(heard: Heard) -> list[float]:
    return [one.value for one in heard.logprobs if one.value is not None]


@pytest.mark.parametrize("names", [(), ("math",)])
def test_each_choice_has_its_own_random_numbers_however_many_choices_there_are(rig: Rig, names: tuple[str, ...]) -> None:
    ask = GenerateRequest(prompt=FOX, adapters=names, max_tokens=20, sampling=replace(WARM, seed=3, num_logprobs=0))
    (alone,), two, five = (
        run(rig, replace(ask, sampling=replace(ask.sampling, num_choices=num_choices))) for num_choices in (1, 2, 5)
    )
    assert len({tuple(heard.tokens) for heard in five}) == 5
    assert alone.tokens == two[0].tokens
    assert [heard.tokens for heard in two] == [heard.tokens for heard in five[:2]]
    assert values(alone) == pytest.approx(values(five[0]), abs=1e-4)
    for choice, heard in enumerate(five):
        assert heard.done.choice == choice
        assert heard.text == rig.decode(heard.tokens)
        assert all(event.choice == choice for event in heard.events if not isinstance(event, ErrorEvent))


def test_greedy_choices_are_all_equal_to_a_single_one(rig: Rig) -> None:
    (alone,) = run(rig, GenerateRequest(prompt=FOX, max_tokens=12))
    several = run(rig, GenerateRequest(prompt=FOX, max_tokens=12, sampling=SamplingParams(num_choices=3)))
    assert [heard.tokens for heard in several] == [alone.tokens] * 3


def test_choices_are_the_same_beside_other_requests(rig: Rig) -> None:
    ask = GenerateRequest(prompt=FOX * 2, max_tokens=15, sampling=replace(WARM, seed=8, num_choices=3))
    alone = run(rig, ask)
    company = [rig.ask(GenerateRequest(prompt=FOX[:n], max_tokens=30, adapters=("safety",))) for n in (3, 20)]
    rig.step()
    together = run(rig, ask)
    assert [heard.tokens for heard in together] == [heard.tokens for heard in alone]
    assert all(heard.is_done for heard in company)


@pytest.mark.parametrize("names", [(), ("math", "safety")])
def test_the_prompt_of_all_choices_is_computed_once(writer_model: Path, adapters: Path, names: tuple[str, ...]) -> None:
    rig = build(writer_model, adapters)
    runner = WatchedRunner(rig)
    heard = run(rig, GenerateRequest(prompt="x" * 65, adapters=names, max_tokens=6, sampling=replace(WARM, num_choices=4)))
    # The other choices share its four full blocks: each computes the last prompt token, and all its outputs but the last.
    assert runner.num_tokens == 65 + 3 * 1 + 4 * 5
    assert [h.done.num_cached_tokens for h in heard] == [0, 64, 64, 64]
    assert [h.done.num_prompt_tokens for h in heard] == [65] * 4


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("prompt", ["a", "x" * 16, FOX * 2])
def test_all_choices_echo_the_prompt_with_its_logprobs(rig: Rig, prompt: str, max_tokens: int) -> None:
    heard = run(
        rig,
        GenerateRequest(
            prompt=prompt, max_tokens=max_tokens, sampling=replace(WARM, seed=1, echo=True, num_logprobs=2, num_choices=3)
        ),
    )
    (alone,) = run(
        rig, GenerateRequest(prompt=prompt, max_tokens=max_tokens, sampling=replace(WARM, seed=1, echo=True, num_logprobs=2))
    )
    num_prompt = len(heard[0].sequence.request.prompt_ids)
    for one in heard:
        assert one.text.startswith(prompt)
        assert len(one.text) == len(prompt) + max_tokens
        assert len(one.logprobs) == num_prompt + max_tokens
        assert one.logprobs[0].value is None
        assert values(one)[: num_prompt - 1] == pytest.approx(values(alone)[: num_prompt - 1], abs=1e-4)
        assert [p.text_offset for p in one.logprobs] == [p.text_offset for p in alone.logprobs]
        assert isinstance(one.events[0], TextEvent)
        assert one.events[0].is_prompt
        assert one.done.num_completion_tokens == max_tokens
    assert values(heard[0]) == pytest.approx(values(alone), abs=1e-4)


def test_the_prompt_s_logprobs_are_reported_once_where_it_is_computed_in_many_chunks(writer_model: Path) -> None:
    rig = build(writer_model, max_step_tokens=9)
    heard = run(
        rig, GenerateRequest(prompt=FOX * 3, max_tokens=2, sampling=replace(WARM, echo=True, num_logprobs=0, num_choices=3))
    )
    assert [len(one.logprobs) for one in heard] == [len(FOX) * 3 + 2] * 3


def test_the_prompt_s_logprobs_are_written_once_for_all_choices_and_a_token_s_text_once_for_all_requests(rig: Rig) -> None:
    """Regression: for every choice, each token of the prompt and each of their alternatives were decoded again."""
    ask = GenerateRequest(prompt=FOX * 2, max_tokens=1, sampling=replace(WARM, seed=1, echo=True, num_logprobs=5, num_choices=4))
    first, *others = (one.logprobs[:-1] for one in run(rig, ask))
    assert len(first) == len(FOX) * 2
    assert all(ours is theirs for other in others for ours, theirs in zip(first, other, strict=True))
    num_decoded = token_text.cache_info().misses
    run(rig, ask)
    assert token_text.cache_info().misses == num_decoded


def test_a_choice_that_stops_early_lets_the_others_go_on(rig: Rig) -> None:
    ask = GenerateRequest(prompt=FOX, max_tokens=40, sampling=replace(WARM, seed=3, num_choices=4))
    whole = run(rig, ask)
    stop = whole[2].text[5:8]
    cut = run(rig, replace(ask, sampling=replace(ask.sampling, stop=(stop,))))
    for one, other in zip(whole, cut, strict=True):
        at = one.text.find(stop)
        assert other.text == (one.text if at < 0 else one.text[:at])
        assert other.done.finish_reason == ("length" if at < 0 else "stop_sequence")
    assert {other.done.finish_reason for other in cut} == {"length", "stop_sequence"}


@pytest.mark.parametrize("num_steps", [0, 1, 3, 6])
def test_aborting_a_request_ends_all_its_choices(rig: Rig, num_steps: int) -> None:
    other = rig.ask(GenerateRequest(prompt="a", max_tokens=20))
    request = rig.admission.admit(GenerateRequest(prompt=FOX, max_tokens=200, sampling=replace(WARM, num_choices=3)))
    heard = rig.submit_choices(request)
    for _ in range(num_steps):
        rig.step()
    rig.engine.abort(request.id)
    rig.step()
    assert [one.done.finish_reason for one in heard] == ["cancelled"] * 3
    assert not any(one.sequence.blocks for one in heard)
    rig.finish()
    assert [sum(isinstance(e, DoneEvent) for e in one.events) for one in heard] == [1] * 3
    assert len(other.text) == 20


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("num_outputs", [0, 1, 4])
def test_a_choice_that_fails_fails_only_its_request(rig: Rig, failing: int, num_outputs: int) -> None:
    if failing and not num_outputs:
        num_outputs = 1  # before its first output, a later choice is not computed by itself
    ask = GenerateRequest(prompt=FOX, max_tokens=12)
    (expected,) = run(rig, ask)
    request = rig.admission.admit(GenerateRequest(prompt=FOX * 2, max_tokens=12, sampling=replace(WARM, num_choices=3)))
    runner = rig.engine._executor.runner
    WatchedRunner(rig, lambda chunk: ValueError("no good") if is_failing(chunk.sequence) else None)

    def is_failing(sequence: object) -> bool:
        return sequence is heard[failing].sequence and len(heard[failing].tokens) == num_outputs

    heard, other = rig.submit_choices(request), rig.ask(ask)
    rig.finish()
    rig.engine._executor.runner = runner
    for one in heard:
        assert isinstance(one.events[-1], ErrorEvent)
        assert "no good" in one.events[-1].message
        assert one.events[-1].kind == "engine"
        assert sum(isinstance(event, ErrorEvent) for event in one.events) == 1
    assert other.tokens == expected.tokens


def test_an_overflow_in_one_choice_is_reported_once(rig: Rig) -> None:
    runner = rig.engine._executor.runner
    heard = rig.submit_choices(
        rig.admission.admit(GenerateRequest(prompt=FOX, max_tokens=12, sampling=replace(WARM, num_choices=3)))
    )
    WatchedRunner(rig, overflows=lambda chunk: chunk.sequence is heard[1].sequence and len(heard[1].tokens) == 3)
    rig.finish()
    rig.engine._executor.runner = runner
    for one in heard:
        assert isinstance(one.events[-1], ErrorEvent)
        assert "overflow" in one.events[-1].message
        assert sum(isinstance(event, ErrorEvent) for event in one.events) == 1


def test_a_stop_token_at_once_ends_every_choice(tokenizer: PreTrainedTokenizerFast) -> None:
    heard = run(scripted(tokenizer, [EOS]), GenerateRequest(prompt="x", sampling=SamplingParams(num_choices=3)))
    assert [(one.text, one.done.finish_reason) for one in heard] == [("", "stop")] * 3
