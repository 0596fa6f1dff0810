"""Sampling parameters from end to end: through admission, scheduler and steps, beside other requests."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lori.base_model import BaseModel
from lori.template import encode
from server.engine.generate_request import GenerateRequest
from server.engine.request import ErrorEvent, SamplingParams
from tests.server.rig import EOS, Rig, build, scripted

FOX = "The quick brown fox jumps over the lazy dog. "
Edit = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]
"""Takes a row of logits, the prompt and the output so far. Returns the row whose likeliest token comes next."""


@pytest.fixture(scope="module")
def rig(writer_model: Path) -> Rig:
    """Return one engine for the whole file, which is idle between tests."""
    return build(writer_model)


def by_hand(writer: BaseModel, prompt: str, num_tokens: int, edit: Edit) -> list[int]:
    """Return the tokens that are the likeliest of transformers' logits after `edit`."""
    ids, output = encode(writer.tokenizer, prompt).ids, list[int]()
    for _ in range(num_tokens):
        with torch.inference_mode():
            row = writer.model(torch.tensor([[*ids, *output]])).logits[0, -1]
            output.append(int(edit(row, ids, output).argmax()))
    return output


def biased(row: torch.Tensor, _: Sequence[int], __: Sequence[int]) -> torch.Tensor:
    row[65], row[70], row[71] = row[65] + 6.5, row[70] - 3, float("-inf")
    return row


def repeated(row: torch.Tensor, ids: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    seen = sorted({*ids, *output})
    row[seen] = torch.where(row[seen] > 0, row[seen] / 3, row[seen] * 3)
    return row


def present(row: torch.Tensor, _: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    for token in output:
        row[token] -= 1.5
    row[sorted({*output})] -= 2
    return row


@pytest.mark.parametrize(
    ("sampling", "edit"),
    [
        pytest.param(SamplingParams(), lambda row, _, __: row, id="nothing"),
        pytest.param(SamplingParams(logit_bias=((65, 6.5), (70, -3.0), (71, float("-inf")))), biased, id="bias"),
        pytest.param(SamplingParams(repetition_penalty=3.0), repeated, id="repetition"),
        pytest.param(SamplingParams(presence_penalty=2.0, frequency_penalty=1.5), present, id="presence and frequency"),
    ],
)
def test_the_likeliest_token_of_the_changed_logits_is_picked(
    rig: Rig, writer: BaseModel, sampling: SamplingParams, edit: Edit
) -> None:
    ask = GenerateRequest(prompt=FOX, max_tokens=25, sampling=replace(sampling, num_logprobs=0))
    heard, other = rig.run([ask, GenerateRequest(prompt="a", max_tokens=30)])
    assert heard.tokens == by_hand(writer, FOX, 25, edit)
    assert other.tokens == by_hand(writer, "a", 30, lambda row, _, __: row)
    if sampling != SamplingParams():
        assert heard.tokens != by_hand(writer, FOX, 25, lambda row, _, __: row), "the parameters have to change the answer"


def test_logprobs_are_the_model_s_own_whichever_token_is_picked(rig: Rig, writer: BaseModel) -> None:
    (heard,) = rig.run(
        [GenerateRequest(prompt=FOX, max_tokens=10, sampling=SamplingParams(logit_bias=((65, 100.0),), num_logprobs=1))]
    )
    assert heard.tokens == [65] * 10
    ids = encode(writer.tokenizer, FOX).ids
    with torch.inference_mode():
        rows = writer.model(torch.tensor([[*ids, *heard.tokens]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    assert [one.value for one in heard.logprobs] == pytest.approx(rows[:, 65].tolist(), abs=1e-4)
    assert [max(one.top.values()) for one in heard.logprobs] == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)


def test_a_forbidden_vocabulary_fails_only_its_own_request(rig: Rig) -> None:
    nothing = SamplingParams(logit_bias=tuple((token, float("-inf")) for token in range(EOS + 1)))
    bad, fine = rig.run([GenerateRequest(prompt="a", max_tokens=3, sampling=nothing), GenerateRequest(prompt="a", max_tokens=3)])
    assert isinstance(bad.events[-1], ErrorEvent)
    assert bad.tokens == []
    assert len(fine.tokens) == 3


def test_a_request_that_ignores_eos_goes_on_to_max_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    script = [*encode(tokenizer, "ab").ids, EOS, *encode(tokenizer, "cd").ids, EOS]
    ask = GenerateRequest(prompt="x", max_tokens=6, sampling=SamplingParams(ignore_eos=True, num_logprobs=0))
    on, off = scripted(tokenizer, script).run([ask, replace(ask, sampling=replace(ask.sampling, ignore_eos=False))])
    assert (on.text, on.done.finish_reason, on.done.num_completion_tokens) == ("abcd", "length", 6)
    assert (off.text, off.done.finish_reason, off.done.num_completion_tokens) == ("ab", "stop", 3)
    assert [one.token for one in on.logprobs] == ["a", "b", "<|end|>", "c", "d", "<|end|>"]
    (cut,) = scripted(tokenizer, script).run([replace(ask, sampling=replace(ask.sampling, stop=("cd",)))])
    assert (cut.text, cut.done.finish_reason) == ("ab", "stop_sequence"), "the client's stop strings still count"


@pytest.mark.parametrize(("min_tokens", "num_tokens"), [(0, 1), (1, 2), (4, 5)])
def test_the_stop_token_is_not_picked_before_min_tokens(
    tokenizer: PreTrainedTokenizerFast, min_tokens: int, num_tokens: int
) -> None:
    ask = GenerateRequest(prompt="x", max_tokens=9, sampling=SamplingParams(min_tokens=min_tokens))
    (heard,) = scripted(tokenizer, [EOS] * 9).run([ask])
    assert heard.done.finish_reason == "stop"
    assert heard.done.num_completion_tokens == num_tokens
    assert heard.tokens[-1] == EOS
    assert EOS not in heard.tokens[:-1]


def test_a_stop_string_does_not_count_before_min_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    script = encode(tokenizer, "abcabcabc").ids
    asks = [
        GenerateRequest(prompt="x", max_tokens=9, sampling=SamplingParams(min_tokens=count, stop=("bc",)))
        for count in (0, 3, 4, 9)
    ]
    heard = scripted(tokenizer, script).run(asks)
    assert [one.text for one in heard] == ["a", "a", "abca", "abcabca"]
    assert {one.done.finish_reason for one in heard} == {"stop_sequence"}


def test_cutoffs_leave_the_likeliest_token(rig: Rig, writer: BaseModel) -> None:
    expected = by_hand(writer, FOX, 12, lambda row, _, __: row)
    cutoffs = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
    asks = [
        GenerateRequest(prompt=FOX, max_tokens=12, sampling=SamplingParams(temperature=5.0, **cutoff, seed=1))
        for cutoff in cutoffs
    ]
    assert [heard.tokens for heard in rig.run(asks)] == [expected] * 3
