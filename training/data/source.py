"""Where rows come from: a JSONL file or a data set, and how its columns become a row's fields."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

TEMPLATED = ("prompt", "completion", "chosen", "rejected")


class Source(BaseModel):
    """A JSONL file, or a data set of the hub or of a local folder. A plain string is its path."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str = Field(min_length=1)
    """A JSONL file, a folder of data files, or a hub id such as `openai/gsm8k`."""
    name: str | None = None
    """Which of the data set's configurations."""
    split: str = "train"
    """Which of its splits, or a part of one: `train[:2000]`."""
    prompt: str | None = None
    """A Jinja template over the row's own columns that gives the prompt; `row` is the row itself. A source with templates has no
    fields but theirs."""
    completion: str | None = None
    """The same for the completion."""
    chosen: str | None = None
    """The same for the better answer of a pair."""
    rejected: str | None = None
    """The same for the worse one."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, found: Any) -> Any:
        return {"path": found} if isinstance(found, str) else found

    @field_validator(*TEMPLATED)
    @classmethod
    def _is_template(cls, text: str | None) -> str | None:
        try:
            if text is not None:
                _compiled(text)
        except TemplateSyntaxError as error:
            raise ValueError(f"is no Jinja template: line {error.lineno}: {error.message}") from error
        return text

    @model_validator(mode="after")
    def _has_prompt(self) -> "Source":
        if self.templates and self.prompt is None:
            raise ValueError(f"has a template for {', '.join(self.templates)} and none for the prompt")
        return self

    @model_serializer(mode="wrap")
    def _as_said(self, handler: SerializerFunctionWrapHandler) -> Any:
        said = {key: value for key, value in handler(self).items() if key in self.model_fields_set}
        return self.path if said.keys() == {"path"} else said

    @property
    def is_file(self) -> bool:
        """Whether this is a file: what is none, or not there, is a data set."""
        return Path(self.path).exists() and not Path(self.path).is_dir()

    @property
    def templates(self) -> dict[str, str]:
        """The templates by the field that they give."""
        return {key: text for key in TEMPLATED if (text := getattr(self, key)) is not None}

    def fields(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns a row's fields from its columns; raises `jinja2.TemplateError`, or what else a template runs into.

        Columns that a template may have read are kept, for whoever measures; those with the name of a row's field are not.
        """
        if not self.templates:
            return columns
        rendered = {key: render(text, {"row": columns} | dict(columns)) for key, text in self.templates.items()}
        return {key: value for key, value in columns.items() if key not in OWN_FIELDS} | rendered


OWN_FIELDS = {*TEMPLATED, "messages", "template", "truncated"}
"""What a row's fields are called, see `Row`."""


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise UndefinedError("a column that the template writes is null")
    return value


ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null)


def render(text: str, columns: Mapping[str, Any]) -> str:
    """Return the Jinja template `text` over `columns`, in a sandbox. Raises `jinja2.TemplateError`, or what else it runs into."""
    return _compiled(text).render(columns)


@cache
def _compiled(text: str) -> Template:
    return ENVIRONMENT.from_string(text)
