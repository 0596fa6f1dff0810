"""Reads a source's rows, in order and one at a time: each bad one goes into `Faults` with its line, or its row's number."""

import codecs
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from jinja2 import TemplateError, UndefinedError
from pydantic import ValidationError

from training.data.faults import DataError, Faults, settled
from training.data.row import Needs, Row, fault_of
from training.data.source import OWN_FIELDS, Source

logger = logging.getLogger(__name__)


def read_rows(source: str | Source, needs: Needs = "text", faults: Faults | None = None, form: type[Row] = Row) -> list[Row]:
    """Reads a JSONL file, or a data set where no such file exists; `needs` is what a row must have beside its prompt.

    Rows that cannot be used, or are not of `form`, go into `faults`, which the caller settles; without it, they are refused
    together with `DataError`. Raises `DataError`, too, where the source cannot be read, or has no usable row. Rows that repeat
    others are kept, and counted.
    """
    source = Source(path=source) if isinstance(source, str) else source
    with settled(faults) as found:
        rows = list(_rows(source, needs, found, form))
    if not rows and not found.refuses:
        found.settle()
        raise DataError(f"{source.path} has no usable row")
    if num_repeated := len(rows) - len({row.content for row in rows}):
        logger.info("%s: rows that repeat another's prompt and completion, and are kept: %d", source.path, num_repeated)
    return rows


def _rows(source: Source, needs: Needs, faults: Faults, form: type[Row]) -> Iterator[Row]:
    for origin, found in _objects(source, faults):
        fields = _fields(source, found, origin, faults)
        if fields is None:
            continue
        try:
            row = form.model_validate(fields).at(origin)
        except ValidationError as error:
            kind, detail = fault_of(error)
            faults.add(kind, origin, detail)
            if form.example:
                faults.hint(f"A row looks like {form.example}")
            continue
        if lack := row.lack(needs):
            faults.add(lack[0], origin, lack[1])
        else:
            yield row


def _fields(source: Source, found: object, origin: str, faults: Faults) -> Mapping[str, Any] | None:
    if not isinstance(found, dict):
        faults.add("not an object", origin, f"found {type(found).__name__}")
        return None
    try:
        fields = source.fields(found)
    except UndefinedError as error:
        faults.add("missing field", origin, f"{error.message}; there are {', '.join(map(str, found))}")
        return None
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        faults.add("source template fails", origin, str(error))
        return None
    # A data set says null for a column that a row does not have.
    return {key: value for key, value in fields.items() if value is not None or key not in OWN_FIELDS}


def _objects(source: Source, faults: Faults) -> Iterator[tuple[str, object]]:
    if not source.is_file:
        yield from _data_set(source)
    elif unused := {"name", "split"} & source.model_fields_set:
        raise DataError(f"{source.path} is a file, which has no {' and no '.join(sorted(unused))}")
    else:
        yield from _jsonl(Path(source.path), faults)


def _jsonl(path: Path, faults: Faults) -> Iterator[tuple[str, object]]:
    try:
        with path.open("rb") as file:  # Text files end lines at more than a newline, and say of bad UTF-8 no line.
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
        from datasets import load_dataset  # noqa: PLC0415  # an extra; reading a file must not need it
        from datasets.exceptions import DatasetsError  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{source.path!r} is no file, and data sets need: pip install '.[train]'") from error
    try:
        rows = load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, RuntimeError, DatasetsError, httpx.HTTPError) as error:
        raise DataError(f"{source.path!r} is neither a file nor a data set that can be loaded: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{source.path} row {number}", row
