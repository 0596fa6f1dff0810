"""Messages about a program's flags."""

from argparse import ArgumentParser
from typing import Self

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from lori.flags import STRAY, add_argument, flag_faults, refused_arguments


class Settings(BaseModel):
    """Flags that can be wrong in several ways."""

    max_batch: int = Field(default=1, ge=1)
    place: str = "here"
    low: int = 0
    high: int = 1
    weights: list[float] = []

    @field_validator("place")
    @classmethod
    def _no_spaces(cls, value: str) -> str:
        if " " in value:
            raise ValueError("holds a space")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError("--low is above --high")
        return self


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_batch": 0}, "--max-batch: Input should be greater than or equal to 1"),
        ({"place": "a b"}, "--place: holds a space"),
        ({"low": 2}, "--low is above --high"),
        ({"weights": [1, "x"]}, "--weights-1: Input should be a valid number, unable to parse string as a number"),
        ({"max_batch": 0, "place": "a b"}, "--max-batch: Input should be greater than or equal to 1; --place: holds a space"),
    ],
)
def test_every_fault_names_its_flag_in_one_line(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(fields)
    assert flag_faults(caught.value) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("unrecognized arguments: --max-bach 3", "there is no flag --max-bach: did you mean --max-batch?"),
        ("unrecognized arguments: --plce=x --qqqqq", "there is no flag --plce: did you mean --place?; there is no flag --qqqqq: "
         "--help lists them"),
        ("unrecognized arguments: stray", "unrecognized arguments: stray"),
        ("argument --low: expected one argument", "argument --low: expected one argument"),
    ],
)  # fmt: skip
def test_an_unknown_flag_is_reported_with_similar_flags(message: str, expected: str) -> None:
    assert refused_arguments(ValueError(f"error parsing CLI: {message}"), Settings.model_fields) == expected


HINTS = {"--max-model-len": "leave it out", "-c": "use --place", STRAY: "a place is given as --place NAME"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("unrecognized arguments: --max-model-len=4 -c 5", "there is no flag --max-model-len: leave it out; "
         "there is no flag -c: use --place"),
        ("unrecognized arguments: --max_model_len -5", "there is no flag --max_model_len: leave it out"),
        ("unrecognized arguments: --max_bach", "there is no flag --max_bach: did you mean --max-batch?"),
        ("unrecognized arguments: --max-bottles", "there is no flag --max-bottles: --help lists them"),
        ("unrecognized arguments: stray", "unrecognized arguments: stray: a place is given as --place NAME"),
    ],
)  # fmt: skip
def test_a_flag_with_a_hint_is_reported_with_the_hint_and_no_similar_flag(message: str, expected: str) -> None:
    assert refused_arguments(ValueError(f"error parsing CLI: {message}"), Settings.model_fields, HINTS) == expected


@pytest.mark.parametrize(
    ("metavar", "text", "expected"),
    [
        ("Path", "A file. (required)", ("Path", "A file. (required)")),
        ("int", "A number. (default: 0)", ("int", "A number. (default: 0)")),
        ("str", "A name. (default: null)", ("str", "A name.")),
        ("list[Path]", "Files. (required)", ("Path", "Files. May be given several times. (required)")),
        (
            "list[str]",
            "Names (all). (default: ['chat'])",
            ("str", "Names (all). May be given several times. (default: ['chat'])"),
        ),
        ("list[JSON]", "Rows (JSONL). (default: [])", ("VALUE", "Rows (JSONL). May be given several times.")),
    ],
)
def test_help_says_which_flags_may_be_repeated(metavar: str, text: str, expected: tuple[str, str]) -> None:
    action = add_argument(ArgumentParser(), "--flag", metavar=metavar, help=text)
    assert (action.metavar, action.help) == expected
