"""What a request can be refused for, and the one table that makes a status of it."""

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
MAX_WORDS = 300
"""Characters of what pydantic says, which may quote all that was sent."""
SHORT = Repr()
SHORT.maxlevel, SHORT.maxlist, SHORT.maxdict, SHORT.maxstring = 2, 3, 3, 60
WORDS = {"model_attributes_type": "expected an object", "model_type": "expected an object", "dict_type": "expected an object"}
"""Where pydantic's own are of Python."""


class BusyError(Exception):
    """The queue is full."""


class DrainingError(Exception):
    """The server is about to end: it answers, but is not ready."""


class FieldError(Exception):
    """Another error, of what a route calls `field`."""

    def __init__(self, field: str, error: Exception) -> None:
        self.field, self.error = field, error
        super().__init__(str(error))


class BodyError(HTTPException):
    """A body that is not read; `field` names the field with too much in it, where that is known."""

    def __init__(self, message: str, field: str | None = None) -> None:
        self.field = field
        super().__init__(400, f"{field}: {message}" if field else f"the body {message}")


class ConflictError(Exception):
    """What is asked for cannot be as things stand: another request, or a setting, has to come first."""


class StoreError(Exception):
    """The disk, the hub or the store of the adapters failed: what is asked for may do later."""


class EngineError(Exception):
    """The engine failed while it ran the request."""


class AdapterFailedError(EngineError):
    """An adapter that the request named cannot be served."""


class GrammarFailedError(EngineError):
    """The grammar that the request gave could be followed no further."""


class OutOfTimeError(EngineError):
    """The request was not done in its time."""


class StoppedError(EngineError):
    """The server stopped before the request was done."""


FAILURES: dict[ErrorKind, type[EngineError]] = {
    "engine": EngineError,
    "adapter": AdapterFailedError,
    "grammar": GrammarFailedError,
    "timeout": OutOfTimeError,
    "stop": StoppedError,
}
"""By what the engine says of a failure."""
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
    """Return what a client is told in the middle of an answer."""
    return ErrorReply.model_validate(error_reply(*TABLE[FAILURES[event.kind]], event.message, None))


@cache
def _fields() -> frozenset[str]:
    # Of all bodies there are: by the first error, the routes and so their schemas have been imported.
    bodies: tuple[type[BaseModel], ...] = (Message, *_bodies(Body))
    return frozenset(said.alias or field for body in bodies for field, said in body.model_fields.items())


def _bodies(of: type[Body]) -> Iterator[type[Body]]:
    for body in of.__subclasses__():
        yield body
        yield from _bodies(body)


def _say(error: dict[str, Any], body: Any) -> tuple[str, str]:
    # The field as a client would name it, and what is wrong. pydantic's places hold branches of unions too: not our fields.
    *places, last = error["loc"]
    known = [p for p in places[1:] if isinstance(p, int) or p in _fields()]
    message = _cut(WORDS.get(error["type"], str(error["msg"]).removeprefix("Value error, ")), MAX_WORDS)
    if places and places[0] in ("query", "path", "header"):
        return str(last), "is missing" if error["type"] == "missing" else f"{message}, found {SHORT.repr(error['input'])}"
    if error["type"] == "extra_forbidden":
        return _join([*known, last]), unknown_field(str(last), fields_at(body, places[1:]))
    field = _join([*known, last] if isinstance(last, int) or last in _fields() else known)
    if isinstance(error.get("input"), bytes):
        return "", "the body was not read as JSON: send it with the header Content-Type: application/json"
    if error["type"] == "missing":
        return field, message if field else "the body is empty, a JSON object is required"
    if error["type"] == "value_error":
        return field, message
    name = next((place for place in (last, *reversed(known)) if isinstance(place, str)), "")
    return field, f"{message}, found {SHORT.repr(error['input'])}{value_hint(name, error['input'], body)}"


def _body_type(request: Request) -> Any:
    # None where a route reads its body itself.
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
    faults = list(dict.fromkeys(_say(e, body) for e in error.errors()))
    said = "; ".join(f"{field}: {message}" if field else message for field, message in faults[:MAX_FAULTS])
    if len(faults) > MAX_FAULTS:
        said += f"; and {len(faults) - MAX_FAULTS} more"
    return _answer(400, "BadRequestError", said, faults[0][0] or None)


async def on_http(request: Request, error: Exception) -> JSONResponse:
    """Answer an unknown route, a wrong method, and what the framework itself refuses."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        # What is mounted, as files are, is only read; the framework knows no methods of it.
        allowed = ", ".join(allowed_methods(request)) or "GET, HEAD"
        return _answer(405, "BadRequestError", f"the method is {request.method}, expected {allowed}", headers={"Allow": allowed})
    field, message = error.field if isinstance(error, BodyError) else None, str(error.detail)
    if error.status_code == 404 and "endpoint" not in request.scope and isinstance(request.app, Api):
        message = unknown_route(request.method, request.scope["path"], request.app.described)
    return _answer(error.status_code, kind_of(error.status_code), message, field, error.headers)


async def on_known(_: Request, error: Exception) -> JSONResponse:
    """Answer what the table knows."""
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
    """End the exchange with a client that has left: it hears nothing, and 499 is what proxies' logs call it."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=499)


def unknown_reply() -> JSONResponse:
    """Return the answer to a request in which we failed; the log has the trace."""
    return _answer(500, "InternalServerError", "the server failed; its log says why")


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` the same shape."""
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    for kind in (*TABLE, FieldError):
        app.add_exception_handler(kind, on_known)
