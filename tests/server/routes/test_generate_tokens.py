"""Tokens of POST /generate: prompts as token ids, and answers checked against transformers' own logits and processors."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lori.base_model import BaseModel
from lori.template import encode
from tests.server.live import Live
from tests.server.replies import FOX
from tests.server.rig import EOS, greedy

UMLAUTS = "aé€ b😀c"
Edit = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]
"""A function of a row of logits, the prompt and the output so far. It returns the logits from which the next token is chosen."""


def ids_of(writer: BaseModel, text: str) -> list[int]:
    return list(encode(writer.tokenizer, text).ids)


def next_logits(writer: BaseModel, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        row: torch.Tensor = writer.model(torch.tensor([[*ids]])).logits[0, -1]
    return row.clone()


def by_hand(writer: BaseModel, prompt: str, num_tokens: int, edit: Edit) -> str:
    """Return the text of the likeliest tokens of transformers' logits after `edit`."""
    ids, output = ids_of(writer, prompt), list[int]()
    for _ in range(num_tokens):
        output.append(int(edit(next_logits(writer, [*ids, *output]), ids, output).argmax()))
    text = writer.tokenizer.decode(output)
    assert isinstance(text, str)
    return text


# --- token ids


@pytest.mark.parametrize("prompt", [FOX, UMLAUTS, "é"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"max_tokens": 20}, id="answer"),
        pytest.param({"max_tokens": 8, "echo": True, "logprobs": 2, "adapter": "math"}, id="echo"),
        pytest.param({"max_tokens": 0, "echo": True, "logprobs": 0}, id="scored"),
        pytest.param({"max_tokens": 8, "logprobs": 1, "temperature": 1.0, "seed": 5, "n": 2}, id="choices"),
    ],
)
def test_token_ids_get_the_same_answer_as_their_text(live: Live, writer: BaseModel, prompt: str, body: dict[str, Any]) -> None:
    text = live.generate(prompt=prompt, **body)
    tokens = live.generate(prompt=ids_of(writer, prompt), **body)
    assert tokens["text"] == text["text"]
    assert tokens["usage"] | {"cached_tokens": 0} == text["usage"] | {"cached_tokens": 0}
    assert (tokens["choices"] is None) == (text["choices"] is None)
    for one, other in zip(tokens["choices"] or [tokens], text["choices"] or [text], strict=True):
        assert one["text"] == other["text"]
        if "logprobs" not in body:
            assert one["logprobs"] is other["logprobs"] is None
            continue
        for part in ("tokens", "text_offset"):
            assert one["logprobs"][part] == other["logprobs"][part]
        values, expected = ([v for v in choice["logprobs"]["token_logprobs"] if v is not None] for choice in (one, other))
        assert values == pytest.approx(expected, abs=1e-4)


def test_half_a_character_and_the_end_of_text_may_be_in_a_prompt(live: Live, writer: BaseModel) -> None:
    half = ids_of(writer, "€")[:2]
    reply = live.generate(prompt=[*ids_of(writer, "ab"), EOS, *half], echo=True, logprobs=0, max_tokens=0)
    assert reply["text"] == "ab\ufffd"
    assert reply["usage"]["prompt_tokens"] == 5
    assert reply["logprobs"]["tokens"] == ["a", "b", "<|end|>", "\ufffd", "\ufffd"]
    assert reply["logprobs"]["text_offset"] == [0, 1, 2, 2, 2]
    whole = live.generate(prompt=[*ids_of(writer, "x"), *ids_of(writer, "€")[:1]], max_tokens=5, min_tokens=5)
    assert whole["usage"]["completion_tokens"] == 5


# --- which tokens


def biased(row: torch.Tensor, _: Sequence[int], __: Sequence[int]) -> torch.Tensor:
    row[65], row[70] = row[65] + 3.5, row[70] - 100
    return row


def repeated(row: torch.Tensor, ids: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    return RepetitionPenaltyLogitsProcessor(3.0)(torch.tensor([[*ids, *output]]), row[None])[0]


def present(row: torch.Tensor, _: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    row[sorted({*output})] -= 1.5
    return row


def frequent(row: torch.Tensor, _: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    for token in output:
        row[token] -= 0.75
    return row


def all_of_them(row: torch.Tensor, ids: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    return frequent(present(repeated(biased(row, ids, output), ids, output), ids, output), ids, output)


BIAS = {"logit_bias": {"65": 3.5, "70": -100}}


@pytest.mark.parametrize(
    ("fields", "edit"),
    [
        pytest.param(BIAS, biased, id="logit_bias"),
        pytest.param({"repetition_penalty": 3.0}, repeated, id="repetition_penalty"),
        pytest.param({"presence_penalty": 1.5}, present, id="presence_penalty"),
        pytest.param({"frequency_penalty": 0.75}, frequent, id="frequency_penalty"),
        pytest.param(
            BIAS | {"repetition_penalty": 3.0, "presence_penalty": 1.5, "frequency_penalty": 0.75}, all_of_them, id="all of them"
        ),
    ],
)
def test_the_likeliest_token_is_that_of_the_changed_logits(
    live: Live, writer: BaseModel, fields: dict[str, Any], edit: Edit
) -> None:
    reply = live.generate(prompt=FOX, max_tokens=25, **fields)
    assert reply["text"] == by_hand(writer, FOX, 25, edit)
    assert reply["text"] != live.generate(prompt=FOX, max_tokens=25)["text"], "otherwise the test shows nothing"


def test_a_bias_forces_and_forbids_a_token(live: Live, writer: BaseModel) -> None:
    letter = str(ids_of(writer, "Q")[0])
    assert live.generate(prompt=FOX, max_tokens=6, logit_bias={letter: 100})["text"] == "QQQQQQ"
    text = live.generate(prompt=FOX, max_tokens=25)["text"]
    forbidden = {str(token): -100 for token in ids_of(writer, text)}
    other = live.generate(prompt=FOX, max_tokens=25, logit_bias=forbidden)["text"]
    assert not {*other} & {*text}


def test_the_same_token_written_twice_has_both_biases(live: Live, writer: BaseModel) -> None:
    token = ids_of(writer, "Q")[0]
    text = live.generate(prompt=FOX, max_tokens=4)["text"]
    assert live.generate(prompt=FOX, max_tokens=4, logit_bias={f"{token}": 100, f"0{token}": -100})["text"] == text


CUTOFFS: list[tuple[dict[str, Any], Any]] = [
    ({"top_k": 4}, TopKLogitsWarper(4)),
    ({"top_p": 0.3}, TopPLogitsWarper(0.3)),
    ({"min_p": 0.4}, MinPLogitsWarper(0.4)),
]


@pytest.mark.parametrize(("fields", "warper"), CUTOFFS, ids=[next(iter(fields)) for fields, _ in CUTOFFS])
def test_tokens_are_drawn_among_those_that_a_cutoff_leaves(
    live: Live, writer: BaseModel, fields: dict[str, Any], warper: Any
) -> None:
    ids = ids_of(writer, FOX)
    row = LogitsProcessorList([TemperatureLogitsWarper(1.5), warper])(torch.tensor([ids]), next_logits(writer, ids)[None])[0]
    left = {writer.tokenizer.decode([token]) for token in row.isfinite().nonzero()[:, 0].tolist()}
    asked = {"prompt": FOX, "temperature": 1.5, "max_tokens": 1, "n": 64}
    drawn = {choice["text"] for seed in range(4) for choice in live.generate(**asked, **fields, seed=seed)["choices"]}
    assert 2 <= len(left) < 60
    assert drawn <= left
    assert len(drawn) > 1
    assert not {choice["text"] for choice in live.generate(**asked, seed=0)["choices"]} <= left, "otherwise nothing is cut off"


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_narrowest_cutoffs_leave_the_likeliest(live: Live, writer: BaseModel, fields: dict[str, Any]) -> None:
    expected = writer.tokenizer.decode(greedy(writer.model, ids_of(writer, FOX), 12))
    assert live.generate(prompt=FOX, max_tokens=12, temperature=5.0, seed=1, **fields)["text"] == expected


@pytest.mark.parametrize("fields", [{"top_k": 0}, {"top_k": -1}, {"top_k": 10**6}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_the_widest_cutoffs_leave_all(live: Live, fields: dict[str, Any]) -> None:
    asked = {"prompt": FOX, "max_tokens": 12, "temperature": 2.0, "seed": 1}
    assert live.generate(**asked, **fields)["text"] == live.generate(**asked)["text"]
