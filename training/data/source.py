"""Sources of rows: a JSONL file or a data set, whose columns become the fields of rows.

Rows are read in order, one at a time. A bad row goes into `Faults` with its line or its number.
"""

import codecs
import json
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from training.data.faults import DataError, Faults, collecting
from training.data.row import Needs, Row, fault_of

logger = logging.getLogger(__name__)


TEMPLATE_FIELDS = ("prompt", "completion", "chosen", "rejected")


class Source(BaseModel):
    """A JSONL file, or a data set of the hub or of a local folder. A plain string is read as its path."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str = Field(min_length=1)
    """A JSONL file, a folder of data files, or a hub id such as `openai/gsm8k`."""
    name: str | None = None
    """Name of the data set's configuration."""
    split: str = "train"
    """Split of the data set, or a part of one: `train[:2000]`."""
    prompt: str | None = None
    """Jinja template of the prompt over the row's columns; `row` is the row itself. A source with templates has no fields but
    theirs."""
    completion: str | None = None
    """Jinja template of the completion."""
    chosen: str | None = None
    """Jinja template of the better answer of a pair."""
    rejected: str | None = None
    """Jinja template of the worse answer of a pair."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator(*TEMPLATE_FIELDS)
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
    def _as_given(self, handler: SerializerFunctionWrapHandler) -> Any:
        given = {key: value for key, value in handler(self).items() if key in self.model_fields_set}
        return self.path if given.keys() == {"path"} else given

    @property
    def is_file(self) -> bool:
        """Whether the path is an existing file. Any other path is taken for a data set."""
        return Path(self.path).exists() and not Path(self.path).is_dir()

    @property
    def templates(self) -> dict[str, str]:
        """The given templates by the field that each renders."""
        return {key: text for key in TEMPLATE_FIELDS if (text := getattr(self, key)) is not None}

    def fields(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row's fields from its columns. Raises `jinja2.TemplateError`, or any error of a template's own expressions.

        A source with templates keeps the row's columns, since metrics may need them, except columns named like a row field.
        """
        if not self.templates:
            return columns
        rendered = {key: render(text, {"row": columns} | dict(columns)) for key, text in self.templates.items()}
        return {key: value for key, value in columns.items() if key not in ROW_FIELDS} | rendered


ROW_FIELDS = {*TEMPLATE_FIELDS, "messages", "template", "truncated"}
"""Names of the fields of `Row`."""


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise UndefinedError("a column that the template writes is null")
    return value


ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null)


def render(text: str, columns: Mapping[str, Any]) -> str:
    """Return the Jinja template `text` rendered over `columns` in a sandbox. Raises as `Source.fields`."""
    return _compiled(text).render(columns)


@cache
def _compiled(text: str) -> Template:
    return ENVIRONMENT.from_string(text)


def read_rows(source: str | Source, needs: Needs = "text", faults: Faults | None = None, form: type[Row] = Row) -> list[Row]:
    """Read the rows of a JSONL file, or of a data set if there is no such file.

    `needs`: what a row must have besides its prompt. `form`: the class of the rows. Rows that cannot be used go into `faults`,
    which the caller reports. Without `faults`, all bad rows raise one `DataError`. `DataError` is also raised if the source
    cannot be read or has no usable row. Duplicate rows are kept; their number is logged.
    """
    source = Source(path=source) if isinstance(source, str) else source
    with collecting(faults) as collected:
        rows = list(_rows(source, needs, collected, form))
    if not rows and not collected.refuses:
        collected.raise_or_warn()
        raise DataError(f"{source.path} has no usable row")
    if num_repeated := len(rows) - len({row.content for row in rows}):
        logger.info("%s: rows that repeat another's prompt and completion: %d", source.path, num_repeated)
    return rows


def _rows(source: Source, needs: Needs, faults: Faults, form: type[Row]) -> Iterator[Row]:
    for origin, columns in _objects(source, faults):
        fields = _fields(source, columns, origin, faults)
        if fields is None:
            continue
        try:
            row = form.model_validate(fields).set_origin(origin, str(source.model_dump()))
        except ValidationError as error:
            kind, detail = fault_of(error)
            faults.add(kind, origin, detail)
            if form.example:
                faults.hint(f"A row looks like {form.example}")
            continue
        if fault := row.missing(needs):
            faults.add(fault[0], origin, fault[1])
        else:
            yield row


def _fields(source: Source, columns: object, origin: str, faults: Faults) -> Mapping[str, Any] | None:
    if not isinstance(columns, dict):
        faults.add("not an object", origin, f"found {type(columns).__name__}")
        return None
    try:
        fields = source.fields(columns)
    except UndefinedError as error:
        faults.add("missing field", origin, f"{error.message}; there are {', '.join(map(str, columns))}")
        return None
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        faults.add("source template fails", origin, str(error))
        return None
    # A data set has null for a column that a row does not have.
    return {key: value for key, value in fields.items() if value is not None or key not in ROW_FIELDS}


def _objects(source: Source, faults: Faults) -> Iterator[tuple[str, object]]:
    if not source.is_file:
        yield from _data_set(source)
    elif unused := {"name", "split"} & source.model_fields_set:
        raise DataError(f"{source.path} is a file, which has no {' and no '.join(sorted(unused))}")
    else:
        yield from _jsonl(Path(source.path), faults)


def _jsonl(path: Path, faults: Faults) -> Iterator[tuple[str, object]]:
    try:
        with path.open("rb") as file:  # text mode ends lines at \r, too, and an error for bad UTF-8 has no line
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield from _line(line, f"{path} line {number}", faults)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _line(line: bytes, origin: str, faults: Faults) -> Iterator[tuple[str, object]]:
    try:
        yield origin, json.loads(line.decode())
    except UnicodeDecodeError as error:
        faults.add("not UTF-8", origin, f"byte {error.start + 1}: {error.reason}")
    except (ValueError, RecursionError) as error:
        faults.add("not JSON", origin, str(error))


def _data_set(source: Source) -> Iterator[tuple[str, object]]:
    looks_local = Path(source.path).suffix in (".json", ".jsonl") or source.path.startswith((".", "/"))
    if looks_local and not Path(source.path).is_dir():
        raise DataError(f"there is no file {source.path!r}")
    try:
        from datasets import load_dataset  # noqa: PLC0415  # an optional dependency, which reading a file must not need
        from datasets.exceptions import DatasetsError  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{source.path!r} is no file, and data sets need: pip install '.[train]'") from error
    try:
        rows = load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, RuntimeError, DatasetsError, httpx.HTTPError) as error:
        raise DataError(f"{source.path!r} is neither a file nor a data set that can be loaded: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{source.path} row {number}", row
