"""The texts of `training.demo`: what is measured on them is not in the training data."""

import json
from itertools import product

import pytest

from training.demo.__main__ import HERE


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


@pytest.mark.parametrize("name", ["general_questions", "personal_messages"])
def test_no_background_message_is_a_test_message(name: str) -> None:
    assert not {*lines(name)} & {*lines("ordinary_test")}


def test_no_act_is_both_harmful_and_harmless() -> None:
    assert not {*lines("harmful_acts"), *lines("harmful_acts_test")} & {*lines("harmless_acts"), *lines("harmless_acts_test")}
