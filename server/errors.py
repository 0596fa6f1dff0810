"""Errors that refuse a request, and the one table that maps them to statuses."""

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

from lori.errors import AdapterFormatError, TemplateError, UnknownAdapterError
from lori.template import Message
from server.access.caller import ForbiddenError
from server.access.limits import RateLimitedError
from server.description.openapi import Api, allowed_methods
from server.engine.adapters.registry import AmbiguousVersionError, FaultyAdapterError, PolicyError
from server.engine.admission import RefusedError
from server.engine.grammar import CrowdedError
from server.engine.request import ErrorEvent, ErrorKind
from server.engine.thread import EngineDeadError
from server.migration.suggestions import fields_at, unknown_field, unknown_route, value_hint
from server.model_names import ModelWeightsError, UnknownModelError
from server.schemas.errors import ErrorReply, error_reply, kind_of
from server.schemas.fields import Body

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


class BusyError(Exception):
    """The queue is full."""


class DrainingError(Exception):
    """The server is about to end. It still answers, but is not ready."""


class FieldError(Exception):
    """Another error, which concerns the field that a route calls `field`."""

    def __init__(self, field: str, error: Exception) -> None:
        self.field, self.error = field, error
        super().__init__(str(error))


class BodyError(HTTPException):
    """A body that is not parsed. `field` names the field that holds too much, if it is known."""

    def __init__(self, message: str, field: str | None = None) -> None:
        self.field = field
        super().__init__(400, f"{field}: {message}" if field else f"the body {message}")


class ConflictError(Exception):
    """The request conflicts with the present state: another request, or a setting, has to come first."""


class StoreError(Exception):
    """The disk, the hub or the adapters' store failed. The same request may succeed later."""


class EngineError(Exception):
    """The engine failed while it ran the request."""


class AdapterFailedError(EngineError):
    """An adapter that the request names cannot be served."""


class GrammarFailedError(EngineError):
    """The answer cannot follow the request's grammar any further."""


class OutOfTimeError(EngineError):
    """The request did not finish within its timeout."""


class StoppedError(EngineError):
    """The server stopped before the request was done."""


FAILURES: dict[ErrorKind, type[EngineError]] = {
    "engine": EngineError,
    "adapter": AdapterFailedError,
    "grammar": GrammarFailedError,
    "timeout": OutOfTimeError,
    "stop": StoppedError,
}
"""Errors by the engine's kind of failure."""
TABLE: dict[type[Exception], tuple[int, str]] = {
    RefusedError: (400, "BadRequestError"),
    TemplateError: (400, "BadRequestError"),
    AdapterFormatError: (400, "BadRequestError"),
    AmbiguousVersionError: (400, "BadRequestError"),
    ForbiddenError: (403, "PermissionDeniedError"),
    UnknownAdapterError: (404, "NotFoundError"),
    UnknownModelError: (404, "NotFoundError"),
    ModelWeightsError: (400, "BadRequestError"),
    ConflictError: (409, "ConflictError"),
    StoreError: (503, "ServiceUnavailableError"),
    BusyError: (429, "RateLimitError"),
    RateLimitedError: (429, "RateLimitError"),
    DrainingError: (503, "ServiceUnavailableError"),
    CrowdedError: (429, "RateLimitError"),
    EngineError: (500, "InternalServerError"),
    AdapterFailedError: (500, "AdapterError"),
    FaultyAdapterError: (500, "AdapterError"),
    PolicyError: (500, "AdapterError"),
    GrammarFailedError: (422, "GrammarError"),
    OutOfTimeError: (504, "TimeoutError"),
    StoppedError: (503, "ServiceUnavailableError"),
    EngineDeadError: (503, "ServiceUnavailableError"),
}
FIELDS: dict[type[Exception], str] = {
    TemplateError: "messages",
    UnknownAdapterError: "adapter",
    AmbiguousVersionError: "adapter",
    FaultyAdapterError: "adapter",
    UnknownModelError: "model",
    ModelWeightsError: "model",
}


def _answer(
    status: int,
    kind: str,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    faults: Sequence[str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_reply(status, kind, message, param, faults), status, headers)


def failure_reply(event: ErrorEvent) -> ErrorReply:
    """Return the error event of a stream for a failure of the engine."""
    return ErrorReply.model_validate(error_reply(*TABLE[FAILURES[event.kind]], event.message, None))


@cache
def _fields() -> frozenset[str]:
    # Fields of all bodies. By the first error, all routes and so all schemas have been imported.
    bodies: tuple[type[BaseModel], ...] = (Message, *_bodies(Body))
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
        return _join([*path, last]), unknown_field(str(last), fields_at(body, places[1:]))
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
    return _answer(status, name, str(error), field, headers, faults)


async def on_disconnect(_: Request, error: Exception) -> Response:
    """End the exchange with a client that disconnected. It reads no answer; 499 is the status that proxies log."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=499)


def unknown_reply() -> JSONResponse:
    """Return the answer to a request on which the server failed. The log has the traceback."""
    return _answer(500, "InternalServerError", "the server failed; its log says why")


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` the same shape."""
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    for kind in (*TABLE, FieldError):
        app.add_exception_handler(kind, on_table_error)
