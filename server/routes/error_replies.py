"""Replies to requests that are refused or fail: every error in the same shape."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from reprlib import Repr
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lori.errors import AdapterFormatError, UnknownAdapterError
from lori.named_merge import MergedAdapter, NamedMerge
from lori.template import Message
from server.access.limits import RateLimitedError
from server.description.openapi import Api, allowed_methods
from server.engine.adapters.registry import FaultyAdapterError
from server.engine.generate_request import RefusedError
from server.errors import FIELDS, TABLE, BodyError, FieldError, StoppedError, StoreError
from server.migration.suggestions import fields_at, unknown_field, unknown_route, value_hint
from server.schemas.errors import error_reply, kind_of
from server.schemas.fields import Body
from server.schemas.model_names import UnknownModelError
from server.telemetry.exchange import current

MAX_FAULTS = 10
MAX_NAME = 64
MAX_PYDANTIC_MESSAGE = 300
"""Characters of a pydantic message, which may quote all that was sent."""
SHORT = Repr()
SHORT.maxlevel, SHORT.maxlist, SHORT.maxdict, SHORT.maxstring = 2, 3, 3, 60
PYDANTIC_MESSAGES = {
    "model_attributes_type": "expected an object",
    "model_type": "expected an object",
    "dict_type": "expected an object",
}
"""Replacements for pydantic messages that speak of Python."""


def _answer(
    status: int,
    kind: str,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    faults: Sequence[str] | None = None,
) -> JSONResponse:
    if exchange := current.get():
        exchange.refusal = {"error_type": kind} | ({"error_param": param} if param else {})
    return JSONResponse(error_reply(status, kind, message, param, faults), status, headers)


@cache
def _fields() -> frozenset[str]:
    # Fields of all bodies. By the first error, all routes and so all schemas have been imported.
    bodies: tuple[type[BaseModel], ...] = (Message, MergedAdapter, NamedMerge, *_bodies(Body))
    return frozenset(info.alias or field for body in bodies for field, info in body.model_fields.items())


def _bodies(parent: type[Body]) -> Iterator[type[Body]]:
    for body in parent.__subclasses__():
        yield body
        yield from _bodies(body)


def _fault(error: dict[str, Any], body: Any) -> tuple[str, str]:
    # The field as a client names it, and the fault. pydantic's locations also hold branches of unions, which are not fields.
    *places, last = error["loc"]
    path = [p for p in places[1:] if isinstance(p, int) or p in _fields()]
    message = _cut(PYDANTIC_MESSAGES.get(error["type"], str(error["msg"]).removeprefix("Value error, ")), MAX_PYDANTIC_MESSAGE)
    if places and places[0] in ("query", "path", "header"):
        return str(last), "is missing" if error["type"] == "missing" else f"{message}, found {SHORT.repr(error['input'])}"
    if error["type"] == "extra_forbidden":
        return _join([*path, last]), unknown_field(str(last), fields_at(body, places[1:]), error["input"])
    field = _join([*path, last] if isinstance(last, int) or last in _fields() else path)
    if isinstance(error.get("input"), bytes):
        return "", "the body was not read as JSON: send it with the header Content-Type: application/json"
    if error["type"] == "missing":
        return field, message if field else "the body is empty, a JSON object is required"
    if error["type"] == "value_error":
        return field, message
    name = next((place for place in (last, *reversed(path)) if isinstance(place, str)), "")
    return field, f"{message}, found {SHORT.repr(error['input'])}{value_hint(name, error['input'], body)}"


def _body_type(request: Request) -> Any:
    # None if the route reads its body itself.
    route = request.scope.get("route")
    field = route.body_field if isinstance(route, APIRoute) else None
    return field.field_info.annotation if field else None


def _join(places: list[Any]) -> str:
    return ".".join(_cut(str(place), MAX_NAME) for place in places)


def _cut(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Answer a body that does not fit its schema, with every fault."""
    assert isinstance(error, RequestValidationError)
    body = _body_type(request)
    faults = list(dict.fromkeys(_fault(e, body) for e in error.errors()))
    text = "; ".join(f"{field}: {message}" if field else message for field, message in faults[:MAX_FAULTS])
    if len(faults) > MAX_FAULTS:
        text += f"; and {len(faults) - MAX_FAULTS} more"
    return _answer(400, "BadRequestError", text, faults[0][0] or None)


async def on_http(request: Request, error: Exception) -> JSONResponse:
    """Answer an unknown route, a wrong method, and every other refusal of the framework."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        # Mounted files are only read; the framework knows no methods for them.
        allowed = ", ".join(allowed_methods(request)) or "GET, HEAD"
        return _answer(405, "BadRequestError", f"the method is {request.method}, expected {allowed}", headers={"Allow": allowed})
    field, message = error.field if isinstance(error, BodyError) else None, str(error.detail)
    if error.status_code == 404 and "endpoint" not in request.scope and isinstance(request.app, Api):
        message = unknown_route(request.method, request.scope["path"], request.app.described)
    return _answer(error.status_code, kind_of(error.status_code), message, field, error.headers)


async def on_table_error(_: Request, error: Exception) -> JSONResponse:
    """Answer an error of `TABLE`."""
    cause = error.error if isinstance(error, FieldError) else error
    kind = type(cause)
    field = error.field if isinstance(error, RefusedError | FieldError) else FIELDS.get(kind)
    status, name = TABLE[kind]
    retry_after_s = error.retry_after_s if isinstance(error, RateLimitedError) else 1
    comes_back = status == 429 or kind in (StoreError, StoppedError)
    headers = {"Retry-After": str(retry_after_s)} if comes_back else None
    faults = cause.shown if isinstance(cause, AdapterFormatError) else None
    faults = cause.faults if isinstance(cause, FaultyAdapterError) else faults
    reply = _answer(status, name, str(error), field, headers, faults)
    if isinstance(cause, UnknownAdapterError | UnknownModelError) and (exchange := current.get()):
        exchange.refusal |= {"unknown_name": _cut(cause.name, MAX_NAME)}
    return reply


async def on_disconnect(_: Request, error: Exception) -> Response:
    """End the exchange with a client that disconnected. It reads no answer; 499 is the status that proxies log."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=499)


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` the same shape."""
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    for kind in (*TABLE, FieldError):
        app.add_exception_handler(kind, on_table_error)
