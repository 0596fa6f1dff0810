"""Bias, min_tokens and penalties, against a slow reference."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.request import Request, SamplingParams, Sequence
from server.engine.sampling.logits_processors import LogitsProcessors, TokenCounts, processed

SIZE = 30
STOP_IDS = np.array([3, 7], dtype=np.int64)


def sequence(
    sampling: SamplingParams, prompt_ids: tuple[int, ...] = (1, 2, 2), output_ids: tuple[int, ...] = (), ignore_eos: bool = False
) -> Sequence:
    request = Request(
        id="", prompt_text="", prompt_ids=prompt_ids, prompt_offsets=(0,) * len(prompt_ids), max_tokens=100,
        sampling=replace(sampling, ignore_eos=ignore_eos),
    )  # fmt: skip
    return Sequence(request, output_ids=list(output_ids))


def logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def apply(rows: torch.Tensor, sequences: dict[int, Sequence]) -> torch.Tensor:
    edits = {row: LogitsProcessors(s, STOP_IDS) for row, s in sequences.items()}
    for row, s in sequences.items():
        edits[row].update(s.output_ids)
    with processed(rows, {row: e for row, e in edits.items() if e.is_active}):
        return rows.clone()


def expected_row(row: list[float], s: Sequence) -> list[float]:
    sampling, prompt, outputs = s.request.sampling, s.request.prompt_ids, s.output_ids
    row = list(row)
    for token, value in sampling.logit_bias:
        row[token] += value
    if len(outputs) < sampling.min_tokens and not s.request.sampling.ignore_eos:
        for token in STOP_IDS:
            row[token] = -math.inf
    for token in range(len(row)):
        if token in prompt or token in outputs:
            row[token] = row[token] / sampling.repetition_penalty if row[token] > 0 else row[token] * sampling.repetition_penalty
        count = outputs.count(token)
        row[token] -= sampling.frequency_penalty * count + (sampling.presence_penalty if count else 0)
    return row


tokens = st.lists(st.integers(0, SIZE - 1), max_size=12).map(tuple)
samplings = st.builds(
    SamplingParams,
    logit_bias=st.lists(st.tuples(st.integers(0, SIZE - 1), st.sampled_from([-math.inf, -100.0, -1.5, 0.5, 100.0]))).map(tuple),
    min_tokens=st.sampled_from([0, 0, 1, 6, 50]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, -0.5, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -0.3, 0.25]),
)
sequences_ = st.builds(sequence, samplings, tokens, tokens, st.booleans())


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(sequences_, min_size=1, max_size=6))
def test_each_row_is_changed_like_the_reference_and_put_back(sequences: list[Sequence]) -> None:
    rows = logits(2 * len(sequences))
    before = rows.clone()
    actual = apply(rows, {2 * i: s for i, s in enumerate(sequences)})
    assert torch.equal(rows, before)
    for i, s in enumerate(sequences):
        assert actual[2 * i].tolist() == pytest.approx(expected_row(before[2 * i].tolist(), s), abs=1e-4)
        assert torch.equal(actual[2 * i + 1], before[2 * i + 1])


def test_the_bias_of_a_token_named_twice_is_the_sum() -> None:
    rows = logits(1)
    actual = apply(rows, {0: sequence(SamplingParams(logit_bias=((4, 1.0), (4, 2.5), (5, 3.0), (5, -math.inf))))})
    assert actual[0, 4] - rows[0, 4] == pytest.approx(3.5)
    assert actual[0, 5] == -math.inf


def test_the_prompt_counts_only_for_the_repetition_penalty() -> None:
    rows = torch.full((1, SIZE), 4.0)
    actual = apply(rows, {0: sequence(SamplingParams(repetition_penalty=2.0, presence_penalty=1.0), (1,), (2,))})
    assert actual[0, :4].tolist() == [4.0, 2.0, 1.0, 4.0]


def test_a_stop_token_is_forbidden_until_there_are_enough_tokens() -> None:
    sampling = SamplingParams(min_tokens=2)
    actual = [apply(logits(1), {0: sequence(sampling, output_ids=(1,) * num)})[0, STOP_IDS].tolist() for num in range(4)]
    assert [row == [-math.inf, -math.inf] for row in actual] == [True, True, False, False]
    ignoring = sequence(sampling, ignore_eos=True)
    assert not LogitsProcessors(ignoring, STOP_IDS).can_change


@pytest.mark.parametrize("scale", [1e38, 3e38, 1e300])
@pytest.mark.parametrize("repetition", [1e-300, 1e300])
@pytest.mark.parametrize("sign", [-1, 1])
def test_huge_values_give_neither_nan_nor_infinity(scale: float, repetition: float, sign: int) -> None:
    bias = ((1, sign * scale), (2, -math.inf), (5, sign * scale), (5, sign * scale), (6, -sign * scale))
    sampling = SamplingParams(
        logit_bias=bias,
        repetition_penalty=repetition,
        presence_penalty=-sign * scale,
        frequency_penalty=sign * scale,
        min_tokens=10,
    )
    rows = logits(1)
    rows[0, 8], rows[0, 9], rows[0, 10] = 3e38, -3e38, 0.0
    actual = apply(rows, {0: sequence(sampling, output_ids=(1, 1, 2, 5, 6, 8, 9, 10, 7))})
    assert not actual.isnan().any()
    assert (actual < math.inf).all()
    assert actual[0, [2, 3, 7]].tolist() == [-math.inf] * 3


def test_the_logits_are_put_back_after_an_error_too() -> None:
    rows = logits(2)
    before = rows.clone()
    edits = LogitsProcessors(sequence(SamplingParams(logit_bias=((1, 9.0),), repetition_penalty=2.0), (1, 2)), STOP_IDS)
    with pytest.raises(ZeroDivisionError), processed(rows, {1: edits}):
        raise ZeroDivisionError
    assert torch.equal(rows, before)


def test_nothing_waits_for_the_device() -> None:
    """A meta tensor has no values, so reading one is an error."""
    edits = LogitsProcessors(
        sequence(SamplingParams(logit_bias=((1, 9.0),), repetition_penalty=2.0, min_tokens=1), (1, 2)), STOP_IDS
    )
    with processed(torch.empty(2, SIZE, device="meta"), {1: edits}):
        pass


@given(st.lists(st.integers(0, 200), max_size=300), st.lists(st.integers(0, 200), max_size=300), st.integers(1, 40))
def test_counting_tokens_in_steps_equals_counting_them_at_once(prompt: list[int], output: list[int], step: int) -> None:
    counts = TokenCounts(prompt)
    for end in range(0, len(output) + step, step):
        counts.update(output[:end])
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == {
        token: output.count(token) for token in (*prompt, *output)
    }


def test_tokens_that_were_counted_are_not_counted_again() -> None:
    counts = TokenCounts(())
    counts.update([1, 2])
    counts.update([9, 9, 2])
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == {1: 1, 2: 2}
