"""Batches of requests: each has the answer that it has alone, and that its adapters give when folded into the weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lori.base_model import BaseModel
from lori.template import encode
from server.engine.generate_request import GenerateRequest
from server.engine.request import ErrorEvent, SamplingParams, TextEvent, TokenLogprob
from tests.server.rig import EOS, Rig, build, fold, scripted, write_adapter
from tests.tiny import save_tiny_model, tiny_llama_config

FOX = "The quick brown fox jumps over the lazy dog. "
MIXED = (
    GenerateRequest(prompt=FOX * 2, max_tokens=30),
    GenerateRequest(prompt="a", max_tokens=40, adapters=("math",)),
    GenerateRequest(prompt=FOX, max_tokens=25, adapters=("safety",), sampling=SamplingParams(num_logprobs=2)),
    GenerateRequest(prompt="What is 12 times 7?", max_tokens=35, adapters=("math", "safety")),
    GenerateRequest(prompt=FOX * 3, max_tokens=5, adapters=("safety", "intent"), weights=(0.25, 1.5)),
    GenerateRequest(prompt="hello", max_tokens=20, sampling=SamplingParams(temperature=0.9, seed=5)),
    GenerateRequest(prompt="hello", max_tokens=20, sampling=SamplingParams(temperature=0.9, seed=5), adapters=("intent",)),
    GenerateRequest(prompt="x" * 16, max_tokens=28, adapters=("math", "safety", "intent"), weights=(1.0, -0.5, 0.75)),
    GenerateRequest(prompt=FOX[:17], max_tokens=1, adapters=("math",), sampling=SamplingParams(echo=True, num_logprobs=0)),
    GenerateRequest(prompt=FOX, max_tokens=0, adapters=("math", "intent"), sampling=SamplingParams(echo=True, num_logprobs=3)),
    GenerateRequest(
        prompt=FOX,
        max_tokens=30,
        sampling=SamplingParams(temperature=1.3, seed=2**62),
        adapters=("math", "safety"),
        weights=(1.0, 0.0),
    ),
    GenerateRequest(prompt="Then", max_tokens=60, adapters=("safety",), sampling=SamplingParams(stop=("q", "zz"))),
)


@pytest.fixture(scope="module")
def rig(writer_model: Path, adapters: Path) -> Rig:
    """Return one engine for the whole file, which is idle between tests."""
    return build(writer_model, adapters)


def values(logprobs: list[TokenLogprob]) -> list[float | None]:
    return [one.value for one in logprobs]


def logprobs_after(model: PreTrainedModel, prompt_ids: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of transformers: for each of `tokens`, a row over the vocabulary."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt_ids, *tokens]])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)


def assert_like(actual: list[float | None], expected: list[float | None], tolerance: float = 1e-4) -> None:
    assert [v for v in actual if v is not None] == pytest.approx([v for v in expected if v is not None], abs=tolerance)
    assert [v is None for v in actual] == [v is None for v in expected]


@pytest.mark.slow
@pytest.mark.parametrize(
    "joins",
    [
        pytest.param([0] * 12, id="all at once"),
        pytest.param(list(range(12)), id="one a step"),
        pytest.param([11, 3, 0, 9, 9, 2, 25, 0, 14, 1, 5, 30], id="as they come"),
    ],
)
def test_a_mixed_batch_gives_each_request_what_it_has_alone(rig: Rig, joins: list[int]) -> None:
    together = rig.run(MIXED, joins)
    for ask, heard in zip(MIXED, together, strict=True):
        (alone,) = rig.run([ask])
        assert heard.tokens == alone.tokens
        assert heard.text == alone.text
        assert replace(heard.done, num_cached_tokens=0) == replace(alone.done, num_cached_tokens=0)
        assert_like(values(heard.logprobs), values(alone.logprobs))


def test_the_adapters_change_the_answers(rig: Rig) -> None:
    """Without this test, the one above would pass for an engine that ignores adapters."""
    routes = [{}, {"adapters": ("math",)}, {"adapters": ("safety",)}, {"adapters": ("intent",)}]
    routes += [{"adapters": ("math", "safety")}, {"adapters": ("math", "safety"), "weights": (1.0, 0.25)}]
    heard = rig.run([GenerateRequest(prompt=FOX, max_tokens=20, **route) for route in routes])
    assert len({h.text for h in heard}) == len(routes)


def test_the_order_of_a_merge_does_not_matter(rig: Rig) -> None:
    first = GenerateRequest(prompt=FOX, max_tokens=20, adapters=("math", "intent"), weights=(0.5, 1.0))
    second = GenerateRequest(prompt=FOX, max_tokens=20, adapters=("intent", "math"), weights=(1.0, 0.5))
    one, other = rig.run([first, second])
    assert one.tokens == other.tokens


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (("math",), (1.0,)),
        (("math",), (-0.5,)),
        (("intent",), (1.0,)),
        (("math", "safety"), (0.5, 0.5)),
        (("safety", "intent"), (0.25, 1.5)),
        (("math", "safety", "intent"), (1.0, -0.5, 0.75)),
    ],
)
def test_a_merge_answers_like_the_folded_weights(
    rig: Rig, writer_model: Path, names: tuple[str, ...], weights: tuple[float, ...]
) -> None:
    prompts = (FOX, "a", "What is 12 times 7?")
    heard = rig.run([GenerateRequest(prompt=p, max_tokens=40, adapters=names, weights=weights) for p in prompts])
    merged = [(rig.adapters[name], weight) for name, weight in zip(names, weights, strict=True)]
    model = fold(AutoModelForCausalLM.from_pretrained(writer_model, dtype=torch.float32), merged)
    for one in heard:
        rows = logprobs_after(model, one.sequence.request.prompt_ids, one.tokens)
        scores = rows.gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        # The likeliest token each time, except for ties within rounding, because folding sums in another order.
        assert scores.tolist() == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)
        assert one.text == rig.decode(one.tokens)
        assert len(one.text) == 40


def test_a_seed_gives_the_same_answer_again_and_another_seed_another_answer(rig: Rig) -> None:
    asks = [GenerateRequest(prompt=FOX, max_tokens=20, sampling=SamplingParams(temperature=1.0, seed=seed)) for seed in (1, 2, 1)]
    first, second, third = rig.run(asks, [0, 0, 4])
    assert first.tokens == third.tokens
    assert first.tokens != second.tokens


@pytest.mark.parametrize("prompt", ["a", "Hi", FOX[:16], FOX[:17], FOX * 3, "aé€😀z"])
@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_echoed_logprobs_are_those_of_transformers(rig: Rig, writer: BaseModel, prompt: str, max_tokens: int) -> None:
    ask = GenerateRequest(prompt=prompt, max_tokens=max_tokens, sampling=SamplingParams(echo=True, num_logprobs=2))
    heard, _ = rig.run([ask, GenerateRequest(prompt=FOX, max_tokens=9)])
    ids = [*heard.sequence.request.prompt_ids, *heard.tokens]
    expected = logprobs_after(writer.model, ids[:1], ids[1:])
    logprobs = heard.logprobs
    assert len(logprobs) == len(ids)
    assert logprobs[0].value is None
    assert logprobs[0].top == {}
    assert_like([one.value for one in logprobs[1:]], expected.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist())
    best = expected.max(-1).values.tolist()
    assert [max(one.top.values()) for one in logprobs[1:]] == pytest.approx(best, abs=1e-4)
    assert heard.text.startswith(prompt)
    assert len(heard.text) == len(prompt) + max_tokens
    assert heard.done.finish_reason == "length"
    assert heard.done.num_completion_tokens == max_tokens
    assert heard.done.num_prompt_tokens == len(heard.sequence.request.prompt_ids)


def test_logprobs_without_echo_are_of_the_answer_alone(rig: Rig, writer: BaseModel) -> None:
    (heard,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=8, sampling=SamplingParams(num_logprobs=0))])
    rows = logprobs_after(writer.model, heard.sequence.request.prompt_ids, heard.tokens)
    assert [one.value for one in heard.logprobs] == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)
    assert [one.token for one in heard.logprobs] == list(heard.text)
    assert [one.text_offset for one in heard.logprobs] == list(range(8))
    assert all(one.top == {} for one in heard.logprobs)


def test_no_logprobs_are_given_where_none_were_asked_for(rig: Rig) -> None:
    (heard,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=3, sampling=SamplingParams(echo=True))])
    assert heard.logprobs == []
    assert len(heard.text) == len(FOX) + 3


def test_each_request_has_as_many_alternatives_as_it_asked_for(rig: Rig) -> None:
    counts = (0, 1, 5, 20)
    heard = rig.run([GenerateRequest(prompt="a", max_tokens=3, sampling=SamplingParams(num_logprobs=count)) for count in counts])
    assert [[len(one.top) for one in h.logprobs] for h in heard] == [[count] * 3 for count in counts]
    full = heard[-1].logprobs[0].top
    assert list(heard[2].logprobs[0].top) == list(full)[:5], "the likeliest tokens come first"


def test_of_alternatives_with_equal_text_the_likeliest_is_reported(tmp_path: Path) -> None:
    """Regression: half of this model's tokens are lone bytes with equal text, and a less likely one replaced the best."""
    save_tiny_model(tmp_path, tiny_llama_config(EOS + 1, tie_word_embeddings=False))
    (heard,) = build(tmp_path).run([GenerateRequest(prompt=FOX, max_tokens=30, sampling=SamplingParams(num_logprobs=20))])
    assert [max(one.top.values()) for one in heard.logprobs] == pytest.approx(values(heard.logprobs), abs=1e-5)


def test_offsets_count_characters_of_the_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    rig = scripted(tokenizer, [*encode(tokenizer, "é€x😀").ids, EOS], max_step_tokens=5)
    (heard,) = rig.run([GenerateRequest(prompt="aé€b", sampling=SamplingParams(echo=True, num_logprobs=0), max_tokens=20)])
    assert heard.text == "aé€bé€x😀"
    prompt, output = [0, 1, 1, 2, 2, 2, 3], [4, 4, 5, 5, 5, 6, 7, 7, 7, 7]
    assert [one.text_offset for one in heard.logprobs][:17] == [*prompt, *output]
    whole = [one for one in heard.logprobs if one.token in ("a", "b", "x")]
    assert [heard.text[one.text_offset] for one in whole] == ["a", "b", "x"]


def test_there_is_a_logprob_for_each_completion_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """This includes tokens that end the answer and have no text. Their offset is where the text would continue."""
    rig = scripted(tokenizer, [*encode(tokenizer, "abc").ids, EOS])
    by_token, by_string = rig.run(
        [
            GenerateRequest(prompt="x", sampling=SamplingParams(num_logprobs=0)),
            GenerateRequest(prompt="x", sampling=SamplingParams(num_logprobs=0, stop=("bc",))),
        ]
    )
    assert [(one.token, one.text_offset) for one in by_token.logprobs] == [("a", 0), ("b", 1), ("c", 2), ("<|end|>", 3)]
    assert [(one.token, one.text_offset) for one in by_string.logprobs] == [("a", 0), ("b", 1), ("c", 2)]
    assert by_token.done.num_completion_tokens == 4
    assert by_string.done.num_completion_tokens == 3


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_scoring_alone_samples_nothing(rig: Rig, length: int) -> None:
    (heard,) = rig.run([GenerateRequest(prompt="y" * length, max_tokens=0, sampling=SamplingParams(echo=True, num_logprobs=0))])
    assert heard.text == "y" * length
    assert heard.tokens == []
    assert len(heard.logprobs) == length
    assert heard.done.finish_reason == "length"


def test_the_echo_comes_with_the_first_step(rig: Rig) -> None:
    heard = rig.ask(GenerateRequest(prompt="Echo: " + FOX, max_tokens=1, sampling=SamplingParams(echo=True)))
    rig.step()
    assert heard.events == [TextEvent("Echo: " + FOX, is_prompt=True)]
    rig.finish()
    assert heard.text.startswith("Echo: " + FOX)
    assert len(heard.text) == len("Echo: " + FOX) + 1


def test_every_token_is_emitted_in_the_step_that_made_it(rig: Rig) -> None:
    heard = rig.ask(GenerateRequest(prompt="a", max_tokens=5))
    for count in range(1, 5):
        rig.step()
        assert len(heard.text) == count
        assert not heard.is_done
    rig.step()
    assert heard.is_done
    assert not rig.scheduler.has_work


def test_the_answer_ends_before_a_stop_string(rig: Rig) -> None:
    (whole,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=60)])
    stop = whole.text[20:23]
    at = whole.text.find(stop)
    (cut,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=60, sampling=SamplingParams(stop=(stop, "never said")))])
    assert cut.text == whole.text[:at]
    assert cut.done.finish_reason == "stop_sequence"
    assert cut.done.num_completion_tokens == at + 3


def test_a_stop_string_in_the_echoed_prompt_stops_nothing(rig: Rig) -> None:
    (heard,) = rig.run([GenerateRequest(prompt="one END", max_tokens=4, sampling=SamplingParams(stop=("END",), echo=True))])
    assert heard.text.startswith("one END")
    assert heard.done.finish_reason == "length"


def test_text_held_back_for_a_stop_string_is_emitted_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    rig = scripted(tokenizer, [*encode(tokenizer, "say EN").ids, EOS])
    ended, cut = rig.run(
        [
            GenerateRequest(prompt="x", sampling=SamplingParams(stop=("END",))),
            GenerateRequest(prompt="x", sampling=SamplingParams(stop=("END",)), max_tokens=5),
        ]
    )
    assert ended.text == "say EN"
    assert ended.done.finish_reason == "stop"
    assert cut.text == "say E"
    assert cut.done.finish_reason == "length"


def test_a_stop_token_ends_the_answer_and_is_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rig = scripted(tokenizer, [*encode(tokenizer, "ab").ids, EOS])
    (heard,) = rig.run([GenerateRequest(prompt="x")])
    assert heard.text == "ab"
    assert heard.done.finish_reason == "stop"
    assert heard.done.num_completion_tokens == 3


def test_a_stop_token_at_once_is_an_empty_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    (heard,) = scripted(tokenizer, [EOS]).run([GenerateRequest(prompt="x")])
    assert heard.text == ""
    assert heard.done.finish_reason == "stop"


def test_the_last_token_that_is_a_stop_token_stops(tokenizer: PreTrainedTokenizerFast) -> None:
    (heard,) = scripted(tokenizer, [*encode(tokenizer, "ab").ids, EOS]).run([GenerateRequest(prompt="x", max_tokens=3)])
    assert heard.done.finish_reason == "stop"


def test_half_a_character_at_the_end_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    (heard,) = scripted(tokenizer, encode(tokenizer, "ab€").ids).run([GenerateRequest(prompt="x", max_tokens=4)])
    assert heard.text == "ab"
    assert heard.done.finish_reason == "length"


def test_an_aborted_request_is_dropped_in_the_next_step(rig: Rig) -> None:
    heard, other = rig.ask(GenerateRequest(prompt=FOX, max_tokens=200)), rig.ask(GenerateRequest(prompt="a", max_tokens=20))
    for _ in range(6):
        rig.step()
    assert heard.text
    rig.engine.abort(heard.sequence.request.id)
    rig.step()
    assert heard.done.finish_reason == "cancelled"
    assert heard.sequence not in rig.scheduler.running
    assert heard.sequence.blocks == []
    length = len(heard.events)
    rig.finish()
    assert len(heard.events) == length, "no event follows the last one"
    assert len(other.text) == 20


def test_a_request_aborted_in_its_prompt_or_in_the_queue_is_dropped_too(writer_model: Path) -> None:
    rig = build(writer_model, max_batch=1)
    reading, waiting = rig.ask(GenerateRequest(prompt=FOX * 3, max_tokens=5)), rig.ask(GenerateRequest(prompt=FOX, max_tokens=5))
    rig.step()
    rig.engine.abort(reading.sequence.request.id)
    rig.engine.abort(waiting.sequence.request.id)
    rig.step()
    assert [h.done.finish_reason for h in (reading, waiting)] == ["cancelled", "cancelled"]
    assert not rig.scheduler.has_work
    rig.finish()


def test_aborting_an_ended_or_unknown_request_does_nothing(rig: Rig) -> None:
    (heard,) = rig.run([GenerateRequest(prompt="a", max_tokens=2)])
    rig.engine.abort(heard.sequence.request.id)
    rig.engine.abort("gen-unknown")
    rig.step()
    assert heard.done.finish_reason == "length"


def test_an_overflow_fails_only_its_own_request(writer_model: Path, writer: BaseModel, tmp_path: Path) -> None:
    """Regression: NaN left in KV memory reached shorter requests through their padding, as 0 * NaN is NaN."""
    write_adapter(tmp_path / "huge", writer, seed=9)
    rig = build(writer_model, tmp_path)
    asks = [GenerateRequest(prompt="a" * n, max_tokens=8) for n in (3, 30)]
    alone = [heard.text for heard in rig.run(asks)]
    huge = GenerateRequest(prompt="b" * 40, adapters=("huge",), weights=(1e38,), max_tokens=8)
    scored = replace(huge, sampling=replace(huge.sampling, echo=True, num_logprobs=2), max_tokens=0)
    *failed, one, two = rig.run([huge, scored, *asks])
    assert all(isinstance(heard.events[-1], ErrorEvent) and "overflow" in heard.events[-1].message for heard in failed)
    assert [one.text, two.text] == alone
    assert [heard.text for heard in rig.run(asks)] == alone
