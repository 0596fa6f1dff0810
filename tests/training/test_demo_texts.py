"""The texts of `training.demo`: what is measured on them is not in the training data."""

import json
import re
from difflib import SequenceMatcher
from itertools import product

import pytest

from training.demo.__main__ import HERE, up_to_sentence


def lines(name: str) -> list[str]:
    return [line for line in (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines() if line.strip()]


def questions(suffix: str) -> set[str]:
    frames = [json.loads(line) for line in lines(f"question_frames{suffix}")]
    acts = [act for name in ("harmful_acts", "harmless_acts") for act in lines(f"{name}{suffix}")]
    return {frame.replace("{{ prompt }}", act) for frame, act in product(frames, acts)}


@pytest.mark.parametrize("name", ["harmful_acts", "harmless_acts", "question_frames", "sum_frames", "mixed_frames"])
def test_test_texts_are_not_in_the_training_data(name: str) -> None:
    assert not {*lines(name)} & {*lines(f"{name}_test")}


def test_no_training_question_is_a_test_question() -> None:
    assert not questions("") & (questions("_test") | {*lines("ordinary_test")})


def content_words(text: str) -> str:
    return " ".join(word for word in re.findall(r"[a-z']+", text.lower()) if word not in {"a", "can", "do", "how", "i", "the"})


@pytest.mark.parametrize("name", ["general_questions", "personal_messages"])
def test_no_background_message_is_a_test_message_in_nearly_the_same_words(name: str) -> None:
    for text, test_text in product(map(content_words, lines(name)), map(content_words, lines("ordinary_test"))):
        matcher = SequenceMatcher(None, text, test_text)
        assert matcher.quick_ratio() < 0.85 or matcher.ratio() < 0.85, (text, test_text)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (" good. It is long.", "Art is good. It is long."),
        (" good. It is lo", "Art is good."),
        ("\n good! Is it", "Art is good!"),
        (" lo", "Art is lo"),
    ],
)
def test_statements_end_with_a_sentence(completion: str, expected: str) -> None:
    assert up_to_sentence({"prompt": "Art is", "completion": completion}) == expected


def test_no_act_is_both_harmful_and_harmless() -> None:
    assert not {*lines("harmful_acts"), *lines("harmful_acts_test")} & {*lines("harmless_acts"), *lines("harmless_acts_test")}
