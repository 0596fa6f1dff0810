"""Bodies of POST /adapters: read once the caller is authorised, and refused at the first wrong part.

No name is used as a path.
"""

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from server.engine.generate_request import RefusedError

if TYPE_CHECKING:  # only type checkers have it
    from python_multipart.multipart import MultipartCallbacks
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from lori.config import CONFIG_FILE
from lori.errors import AdapterError
from lori.format import CARD_FILE, MAX_FILE_BYTES, MAX_TEXT_BYTES, WEIGHTS_FILE, Files
from lori.names import check_name, split_reference
from lori.prompt_statistics import STATISTICS_FILE
from server.schemas.adapters import HubBody
from server.transport.strict_json import JsonError, read_json


async def read_form(content_type: str, chunks: AsyncIterator[bytes], limits: Mapping[str, int]) -> dict[str, bytes]:
    """Return the fields of a form by name. File names in the form are ignored.

    Only the names in `limits` are allowed, once each, with at most so many bytes. Raises `RefusedError`.
    """
    _, options = parse_options_header(content_type)
    form = _Form(limits)
    try:
        parser = MultipartParser(options.get(b"boundary", b""), form.callbacks)
        if not options.get(b"boundary"):
            raise RefusedError("Content-Type", "has no boundary")
        async for chunk in chunks:
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise RefusedError("body", f"is no form: {error}") from error
    if not form.is_whole:
        raise RefusedError("body", "ends before the form does")
    return {name: b"".join(parts) for name, parts in form.fields.items()}


class _Form:
    """State of the form that is being parsed."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.fields: dict[str, list[bytes]] = {}
        self.is_whole = False
        self._limits = limits
        self._header, self._value, self._disposition = b"", b"", b""
        self._field, self._num_bytes = "", 0
        self.callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._add,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._disposition, self._num_bytes = b"", 0

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode(errors="replace")
        if self._field not in self._limits:
            raise RefusedError(self._field[:100], f"unknown field, expected {', '.join(self._limits)}")
        if self._field in self.fields:
            raise RefusedError(self._field, "is there twice")
        self.fields[self._field] = []

    def _add(self, data: bytes, start: int, end: int) -> None:
        self._num_bytes += end - start
        if self._num_bytes > self._limits[self._field]:
            raise RefusedError(self._field, f"has more than {self._limits[self._field]} bytes")
        self.fields[self._field].append(data[start:end])

    def _end(self) -> None:
        self.is_whole = True


FILES = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE, "card": CARD_FILE, "prompt_statistics": STATISTICS_FILE}
"""The form's fields that are files, and their names in the store. File names in the form are ignored."""
REQUIRED = ("name", "config", "weights")
MAX_REFERENCE = 256
LIMITS = {"name": 4 * MAX_REFERENCE} | {field: MAX_FILE_BYTES.get(file, MAX_TEXT_BYTES) for field, file in FILES.items()}
"""Maximum number of bytes of each field. All fields together are limited as a body."""
REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [*REQUIRED],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "description": "What to call it."},
                    "config": {"type": "string", "format": "binary", "description": f"Its {CONFIG_FILE}."},
                    "weights": {"type": "string", "format": "binary", "description": f"Its {WEIGHTS_FILE}."},
                    "card": {"type": "string", "format": "binary", "description": f"Its {CARD_FILE}."},
                    "prompt_statistics": {"type": "string", "format": "binary", "description": f"Its {STATISTICS_FILE}."},
                },
            }
        },
        "application/json": {"schema": HubBody.model_json_schema()},
    },
}


@dataclass(frozen=True, slots=True)
class Upload:
    """An adapter that was sent. Only its name has been checked."""

    name: str
    files: Files


def checked_name(name: str, field: str = "name") -> str:
    """Return an adapter's name. Raises `RefusedError` if it is none; it could be a path."""
    return _checked(check_name, name, field)


def checked_reference(reference: str, field: str = "name") -> str:
    """Return `name` or `name@version`. Raises `RefusedError` if it is neither; it could be a path."""
    return _checked(split_reference, reference, field)


def _checked(check: Callable[[str], object], value: str, field: str) -> str:
    if len(value) > MAX_REFERENCE:
        raise RefusedError(field, f"has {len(value)} characters, expected {MAX_REFERENCE} at most")
    try:
        check(value)
    except AdapterError as error:
        raise RefusedError(field, str(error)) from error
    return value


async def read_upload(http: Request) -> Upload:
    """Return the adapter in a form. Raises `RefusedError` if the form holds none."""
    fields = await read_form(http.headers["content-type"], http.stream(), LIMITS)
    for field in REQUIRED:
        if field not in fields:
            raise RefusedError(field, "is missing")
    name = checked_name(fields["name"].decode(errors="replace"))
    return Upload(name, {file: fields[field] for field, file in FILES.items() if field in fields})


async def hub_body(http: Request, max_bytes: int) -> HubBody:
    """Return the JSON body. Raises `RequestValidationError`, `HTTPException`."""
    content = b""
    async for chunk in http.stream():
        content += chunk
        if len(content) > max_bytes:
            raise HTTPException(413, f"the body is longer than {max_bytes} bytes (--max-body-bytes)", {"Connection": "close"})
    try:
        return HubBody.model_validate(read_json(content))
    except JsonError as error:
        raise HTTPException(400, f"the body {error}") from error
    except ValidationError as error:
        raise RequestValidationError([_in_body(fault) for fault in error.errors(include_url=False)], body=content) from error


def _in_body(fault: Mapping[str, Any]) -> dict[str, Any]:
    return {**fault, "loc": ("body", *fault["loc"])}
