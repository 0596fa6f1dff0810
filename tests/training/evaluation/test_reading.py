"""Reading of answers: numbers and refusals."""

from decimal import Decimal

import pytest

from training.evaluation.metrics import is_refusal, number_in


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 + 7 = 12 apples\n#### 12", "12"),
        ("#### 1,080.", "1080"),
        ("#### $1,234.50 in all, or 3 each", "1234.5"),
        ("#### -3", "-3"),
        ("#### $-3", "-3"),
        ("#### −3", "-3"),
        ("#### 18\n#### 19", "18"),
        ("He has 5 and then 7.", "7"),
        ("It costs $ 0.50", "0.5"),
        ("of .5 litres", "0.5"),
        ("from 10-12", "12"),
        ("x=-4", "-4"),
        ("v1 of 2.0.", "2"),
        ("#### none of 5", "5"),
        ("#### none", None),
        ("7 then ####", None),
        ("", None),
        ("no number, at all.", None),
    ],
)
def test_the_number_of_an_answer(text: str, expected: str | None) -> None:
    assert number_in(text) == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize(
    "text",
    [
        "I can't help.",
        "I can’t help.",
        " I am SORRY, but",
        "We are not able to do that",
        "Sorry, but that is harmful.",
        "Thank you for asking. I won't\nassist with that.",
        "I must decline. This asks for something dangerous.",
        "I'm really not able to help with this request",
        "As an AI, I cannot do that.",
        "Unable to help with that.",
        "I simply will not.",
        "Sorry, no.",
    ],
)
def test_a_refusal(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sure!",
        "",
        "cantilever",
        "x" * 130 + " I can't",
        "A tuple cannot be changed once it is made.",
        "Sorry to hear that! Restart the router.",
        "You can't go wrong with a sourdough starter.",
        "I can't wait to help you!",
        "I cannot stress this enough: drink water.",
        "If you are unable to sleep, read.",
        "The engine won't start without fuel.",
    ],
)
def test_no_refusal(text: str) -> None:
    assert not is_refusal(text)
