"""Reads the bodies of POST /adapters, when it is known that the caller may send one. No name in them is ever a path."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from lori.config import CONFIG_FILE
from lori.errors import AdapterError
from lori.format import CARD_FILE, MAX_TEXT_BYTES, MAX_WEIGHTS_BYTES, WEIGHTS_FILE, Files
from lori.names import check_name, split_reference
from server.engine.admission import RefusedError
from server.routes.form import read_form
from server.schemas.adapters import HubBody
from server.transport.strict_json import JsonError, read_json

FILES = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE, "card": CARD_FILE}
"""The fields of a form that are files, and what they are called in the store, whatever they are called in the form."""
REQUIRED = ("name", "config", "weights")
MAX_REFERENCE = 256
LIMITS = {"name": 4 * MAX_REFERENCE, "config": MAX_TEXT_BYTES, "weights": MAX_WEIGHTS_BYTES, "card": MAX_TEXT_BYTES}
"""Bytes of each field; those of all together are limited as a body is."""
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
                },
            }
        },
        "application/json": {"schema": HubBody.model_json_schema()},
    },
}


@dataclass(frozen=True, slots=True)
class Upload:
    """An adapter that was sent: not looked at yet, but for its name."""

    name: str
    files: Files


def checked_name(name: str, field: str = "name") -> str:
    """Returns an adapter's name. Raises `RefusedError` for what is none, which may be a path."""
    return _checked(check_name, name, field)


def checked_reference(reference: str, field: str = "name") -> str:
    """Returns `name` or `name@version`. Raises `RefusedError` for what is neither, which may be a path."""
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
    """Returns the adapter that a form holds. Raises `RefusedError` for a form that holds none."""
    fields = await read_form(http.headers["content-type"], http.stream(), LIMITS)
    for field in REQUIRED:
        if field not in fields:
            raise RefusedError(field, "is missing")
    name = checked_name(fields["name"].decode(errors="replace"))
    return Upload(name, {file: fields[field] for field, file in FILES.items() if field in fields})


async def hub_body(http: Request, max_bytes: int) -> HubBody:
    """Returns what a JSON body asks for. Raises `RequestValidationError`, `HTTPException`."""
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
        raise RequestValidationError([_in_body(one) for one in error.errors(include_url=False)], body=content) from error


def _in_body(fault: Mapping[str, Any]) -> dict[str, Any]:
    return {**fault, "loc": ("body", *fault["loc"])}
