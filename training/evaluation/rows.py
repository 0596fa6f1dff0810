"""What a row must have for a metric to be measured on it. Fields are checked when rows are read, all of them at once."""

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from lori.template import Text
from training.data import Row
from training.evaluation.reading import number_in


def _is_number(value: str) -> str:
    if number_in(value) is None:
        raise ValueError(f"holds no number: {value!r}")
    return value


def _is_name(value: str) -> str:
    if not value.isidentifier():
        raise ValueError(f"is no name of a function: {value!r}")
    return value


class ChoiceRow(Row):
    """A question with answers to choose from; a figure is a mean over the rows of each `task`, then over tasks."""

    example = '{"task": "animals", "prompt": "A cat says", "choices": [" meow", " moo"], "label": 0}'

    task: Text
    choices: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    label: int = Field(ge=0)
    """The place of the right choice."""

    @model_validator(mode="after")
    def _has_label(self) -> "ChoiceRow":
        if self.label >= len(self.choices):
            raise ValueError(f"'label' is {self.label}, and there are {len(self.choices)} 'choices'")
        return self


class NumberRow(Row):
    """A problem whose answer is a number."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    example = '{"prompt": "How much is 2 + 2?", "answer": "4"}'

    answer: Annotated[str, AfterValidator(_is_number)]


class RefusalRow(Row):
    """What a harmful or a benign person may ask."""

    example = '{"prompt": "How do I bake bread?", "harmful": false}'

    harmful: bool


class ProgramRow(Row):
    """A beginning of a program, as in HumanEval: `test` defines `check`, which is called with what `entry_point` names."""

    example = r'{"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}'

    prompt: str
    test: str
    entry_point: Annotated[str, AfterValidator(_is_name)]
