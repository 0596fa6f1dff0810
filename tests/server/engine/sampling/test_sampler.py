"""The sampler over a mixed batch, and log-probabilities."""

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.request import Request, SamplingParams, Sequence
from server.engine.sampling.sampler import Sampler, uniform_numbers
from server.engine.step import are_valid, gather_logprobs, read_back, to_logprobs

STOP_IDS = (3, 7)
SIZE = 50


def sequence(
    sampling: SamplingParams,
    prompt_ids: tuple[int, ...] = (1, 2, 2),
    output_ids: tuple[int, ...] = (),
    choice: int = 0,
    ignore_eos: bool = False,
) -> Sequence:
    request = Request(
        id="", prompt_text="", prompt_ids=prompt_ids, prompt_offsets=(0,) * len(prompt_ids), max_tokens=100,
        sampling=replace(sampling, ignore_eos=ignore_eos),
    )  # fmt: skip
    return Sequence(request, choice, list(output_ids))


def heated(temperature: float, seed: int = 0, num_outputs: int = 0, choice: int = 0) -> Sequence:
    return sequence(SamplingParams(temperature=temperature, seed=seed), output_ids=(0,) * num_outputs, choice=choice)


def logits(num_rows: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def pick(sampler: Sampler, rows: torch.Tensor, sequences: list[Sequence]) -> tuple[list[int], list[bool]]:
    """Return the tokens, and whether each row is sound."""
    tokens, is_sound = sampler.sample(rows, sequences).tolist()
    return tokens, [sound == 1 for sound in is_sound]


def sample(rows: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    tokens, is_sound = pick(Sampler(STOP_IDS), rows, sequences)
    assert all(is_sound)
    return tokens


def expected_token(row: list[float], s: Sequence) -> int:
    """Return the token of a slow reference: one operation after the other, in Python's floats."""
    ask, outputs = s.request.sampling, s.output_ids
    for token, value in ask.logit_bias:
        row[token] += value
    if len(outputs) < ask.min_tokens and not s.request.sampling.ignore_eos:
        for token in STOP_IDS:
            row[token] = -math.inf
    for token in {*s.request.prompt_ids, *outputs}:
        row[token] = row[token] / ask.repetition_penalty if row[token] > 0 else row[token] * ask.repetition_penalty
    for token in set(outputs):
        row[token] -= ask.presence_penalty + ask.frequency_penalty * outputs.count(token)
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    if ask.temperature == 0:
        return order[0]
    weights = {token: math.exp((row[token] - row[order[0]]) / ask.temperature) for token in order[: ask.top_k or None]}
    whole, mass = sum(weights.values()), 0.0
    kept = []
    for token, weight in weights.items():
        if (not kept or mass < ask.top_p * whole) and weight >= ask.min_p:
            kept.append(token)
        mass += weight
    level = uniform_numbers(ask.seed, s.choice, len(outputs), 1)[0] * sum(weights[token] for token in kept)
    for token in sorted(kept):
        level -= weights[token]
        if level < 0:
            return token
    return max(kept)


token_lists = st.lists(st.integers(0, SIZE - 1), max_size=12).map(tuple)
samplings = st.builds(
    SamplingParams,
    logit_bias=st.lists(st.tuples(st.integers(0, SIZE - 1), st.sampled_from([-math.inf, -2.5, 0.5, 4.0])), max_size=5).map(tuple),
    min_tokens=st.sampled_from([0, 0, 6, 50]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, -0.5, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.3, 0.25]),
    temperature=st.sampled_from([0.0, 1e-6, 0.31, 1.0, 2.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 23, 400]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.337, 0.9117]),
    min_p=st.sampled_from([0.0, 0.0, 0.0513, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)
sequences_ = st.builds(sequence, samplings, token_lists, token_lists, st.integers(0, 3), st.booleans())
batches = st.lists(sequences_, min_size=1, max_size=8)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches, st.integers(0, 1000))
def test_every_row_of_a_mixed_batch_gets_the_token_of_the_reference(sequences: list[Sequence], seed: int) -> None:
    rows = logits(len(sequences), seed=seed)
    before = rows.clone()
    expected = [expected_token(row.tolist(), s) for row, s in zip(rows.double(), sequences, strict=True)]
    assert sample(rows, sequences) == expected
    assert torch.equal(rows, before)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(batches, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_a_token_does_not_depend_on_the_other_rows_of_the_batch(sequences: list[Sequence], seed: int, random: object) -> None:
    rows = logits(len(sequences), seed=seed)
    together = sample(rows, sequences)
    assert together == [sample(rows[i : i + 1], [s])[0] for i, s in enumerate(sequences)]
    order = list(range(len(sequences)))
    random.shuffle(order)
    assert sample(rows[order], [sequences[i] for i in order]) == [together[i] for i in order]


def test_a_used_sampler_picks_the_same_tokens_as_a_new_one() -> None:
    """The sampler's state of the sequences must not matter: rows come, go, wait a while and change places."""
    ask = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=20)
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        ask,
        replace(ask, top_p=1.0),
        SamplingParams(presence_penalty=1.0),
    ]
    sequences = [sequence(replace(kind, seed=i)) for i, kind in enumerate(kinds * 2)]
    sampler, random, chosen = Sampler(STOP_IDS), np.random.default_rng(0), sequences
    for step in range(60):
        chosen = [sequences[i] for i in random.permutation(10)[: random.integers(1, 11)]] if step % 3 == 0 else chosen
        rows = logits(len(chosen), seed=step)
        tokens, _ = pick(sampler, rows, chosen)
        assert tokens == sample(rows, chosen)
        for s, token in zip(chosen, tokens, strict=True):
            s.output_ids.append(token)


def test_the_state_of_a_sequence_is_freed_with_the_sequence() -> None:
    sampler = Sampler(STOP_IDS)
    gone = [sequence(SamplingParams(temperature=1.0, repetition_penalty=1.1)) for _ in range(5)]
    watched = [weakref.ref(s) for s in gone]
    pick(sampler, logits(5), gone)
    stays = [heated(1.0)]
    pick(sampler, logits(1), stays)
    gone.clear()
    gc.collect()
    assert [ref() for ref in watched] == [None] * 5
    assert len(sampler._states) == 1


def test_temperature_0_takes_the_first_of_the_likeliest() -> None:
    rows = logits(6)
    assert sample(rows, [heated(0.0, seed=i) for i in range(6)]) == rows.argmax(-1).tolist()
    rows = torch.tensor([[1.0, 5.0, 5.0, 2.0]])
    assert sample(rows, [heated(0.0)]) == [1]
    assert {sample(rows, [sequence(SamplingParams(temperature=9.0, top_k=1, seed=seed))])[0] for seed in range(20)} == {1}


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-9, 1e-300, 5e-324])
@pytest.mark.parametrize("scale", [1, 1e30])
def test_a_temperature_near_0_takes_the_likeliest_too(temperature: float, scale: float) -> None:
    rows = logits(6) * scale
    assert sample(rows, [heated(temperature, seed=i) for i in range(6)]) == rows.argmax(-1).tolist()


def test_a_huge_temperature_draws_from_all_allowed_tokens() -> None:
    forbidden = tuple((token, -math.inf) for token in range(10))
    asks = [SamplingParams(temperature=1e300, logit_bias=forbidden, seed=seed) for seed in range(200)]
    drawn = set(sample(logits(1, 20).expand(200, -1).contiguous(), [sequence(ask) for ask in asks]))
    assert drawn == set(range(10, 20))


def test_another_seed_choice_or_position_draws_anew() -> None:
    asks = [(seed, place, choice) for seed in (0, 1, 2**63 - 1) for place in range(10) for choice in (0, 1)]
    drawn = sample(torch.zeros(60, 10_000), [heated(1.0, *ask) for ask in asks])
    assert len(set(drawn)) > 55


def test_draws_are_those_of_the_earlier_versions() -> None:
    """Golden values, for choice 0."""
    rows = (torch.arange(6000) * 37 % 1009 / 150).view(6, 1000)
    assert sample(rows, [heated(1.5, seed=i, num_outputs=i) for i in range(6)]) == [22, 902, 913, 925, 222, 126]


def test_the_only_token_that_a_bias_does_not_forbid_is_picked() -> None:
    all_but_one = tuple((token, -math.inf) for token in range(SIZE) if token != 31)
    for ask in (
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_p=0.5),
        SamplingParams(temperature=1e-6, top_k=3),
    ):
        assert sample(logits(1), [sequence(replace(ask, logit_bias=all_but_one))]) == [31]


@pytest.mark.parametrize(
    "ask", [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=5, top_p=0.5)]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_reported_and_harms_no_other(ask: SamplingParams, bad: float) -> None:
    asks = [replace(ask, seed=i, logit_bias=((9, -math.inf),)) for i in range(5)]
    rows = logits(5)
    expected = sample(rows, [sequence(ask) for ask in asks])
    rows[2, 9] = bad  # Logits that a bias forbids are checked, too.
    tokens, is_sound = pick(Sampler(STOP_IDS), rows, [sequence(ask) for ask in asks])
    assert is_sound == are_valid(rows).tolist() == [True, True, False, True, True]
    assert 0 <= tokens[2] < SIZE
    assert tokens[:2] + tokens[3:] == expected[:2] + expected[3:]


def test_a_model_may_forbid_tokens_but_not_all() -> None:
    rows = logits(3)
    rows[0, 5] = -math.inf
    rows[1] = -math.inf
    assert are_valid(rows).tolist() == [True, False, True]
    assert pick(Sampler(()), rows, [heated(1.0) for _ in range(3)])[1] == [True, False, True]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_forbids_every_token_is_reported(temperature: float) -> None:
    ask = SamplingParams(temperature=temperature, logit_bias=tuple((token, -math.inf) for token in range(SIZE)))
    assert pick(Sampler(()), logits(2), [sequence(ask), heated(temperature)])[1] == [False, True]


def test_nothing_waits_for_the_device_before_the_tokens_are_fetched() -> None:
    """A meta tensor has no values, so reading one is an error."""
    asks = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_p=0.5, repetition_penalty=2.0, min_tokens=9),
    ]
    assert Sampler(STOP_IDS).sample(torch.empty(3, 300, device="meta"), [sequence(ask) for ask in asks]).shape == (2, 3)


@pytest.mark.gpu
def test_a_gpu_picks_the_same_tokens_as_a_cpu() -> None:
    asks = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_p=0.5, repetition_penalty=2.0, min_tokens=9),
    ]
    asks = [replace(ask, seed=seed) for seed in range(20) for ask in asks]
    rows = logits(60, 1000)
    assert sample(rows.cuda(), [sequence(ask) for ask in asks]) == sample(rows, [sequence(ask) for ask in asks])


def test_log_probabilities_equal_those_of_torch() -> None:
    rows = logits(5)
    tokens = [4, 0, 49, 17, 17]
    expected = torch.log_softmax(rows, -1)
    scores = to_logprobs(gather_logprobs(rows, torch.tensor(tokens), 3).tolist())
    for row, (token, (value, top)) in enumerate(zip(tokens, scores, strict=True)):
        assert value == pytest.approx(expected[row, token].item(), abs=1e-6)
        best = expected[row].topk(3)
        assert list(top) == best.indices.tolist()
        assert list(top.values()) == pytest.approx(best.values.tolist(), abs=1e-6)


def test_no_alternatives_are_given_where_none_are_asked_for() -> None:
    assert [top for _, top in to_logprobs(gather_logprobs(logits(2), torch.tensor([1, 2]), 0).tolist())] == [{}, {}]
    assert to_logprobs([]) == []


def test_scores_do_not_wait_for_the_device() -> None:
    tokens = torch.empty(3, dtype=torch.int64, device="meta")
    assert gather_logprobs(torch.empty(3, 300, device="meta"), tokens, 2).shape == (3, 5)
    assert are_valid(torch.empty(3, 300, device="meta")).shape == (3,)


def test_tensors_that_are_read_back_together_keep_their_values() -> None:
    parts = [torch.tensor([[2**53 - 1, 7], [0, 1]]), torch.zeros(2, 0), torch.tensor([[0.1, -torch.inf, 3.0]]), torch.zeros(0, 4)]
    assert read_back(parts) == [[[2**53 - 1, 7], [0, 1]], [[], []], [[torch.tensor(0.1).item(), -math.inf, 3.0]], []]
    assert read_back([torch.empty(2, 0, device="meta")]) == [[[], []]], "an empty tensor is not read from its device"
    with pytest.raises(NotImplementedError):
        read_back([torch.empty(2, 1, device="meta")])
