"""What a request can be refused for, and the one table that makes a status of it."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lori.errors import TemplateError, UnknownAdapterError
from server.engine.admission import RefusedError
from server.engine.thread import EngineDeadError
from server.schemas import error_reply

logger = logging.getLogger(__name__)


class BusyError(Exception):
    """The queue is full."""


class EngineError(Exception):
    """The engine failed while it ran the request."""


TABLE: dict[type[Exception], tuple[int, str]] = {
    RefusedError: (400, "BadRequestError"),
    TemplateError: (400, "BadRequestError"),
    UnknownAdapterError: (404, "NotFoundError"),
    BusyError: (429, "RateLimitError"),
    EngineError: (500, "InternalServerError"),
    EngineDeadError: (503, "ServiceUnavailableError"),
}
FIELDS: dict[type[Exception], str] = {TemplateError: "messages", UnknownAdapterError: "adapter"}


def _answer(status: int, kind: str, message: str, param: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(error_reply(status, kind, message, param), status, headers)


def _say(error: dict[str, object]) -> tuple[str, str]:
    # pydantic's places name the branch of a union too: only keys of the body and indices say something to a client.
    places = error["loc"]
    assert isinstance(places, tuple)
    names = [str(p) for p in places[1:] if isinstance(p, int) or (isinstance(p, str) and p.isidentifier())]
    field = ".".join(n for n in names if n not in ("str", "list", "constrained"))
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return field, "unknown field"
    if error["type"] == "json_invalid":
        return "", f"the body is not JSON: {message}"
    if error["type"] in ("missing", "value_error") or "input" not in error:
        return field, message
    return field, f"{message}, found {_short(error['input'])}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


async def on_invalid(_: Request, error: Exception) -> JSONResponse:
    """Answers a body that does not fit its schema, with every fault."""
    assert isinstance(error, RequestValidationError)
    faults = list(dict.fromkeys(_say(e) for e in error.errors()))
    said = "; ".join(f"{field}: {message}" if field else message for field, message in faults)
    return _answer(400, "BadRequestError", said, faults[0][0] or None)


async def on_http(_: Request, error: Exception) -> JSONResponse:
    """Answers an unknown route, a wrong method, and what the framework itself refuses."""
    assert isinstance(error, HTTPException)
    return _answer(error.status_code, "NotFoundError" if error.status_code == 404 else "BadRequestError", str(error.detail))


async def on_known(_: Request, error: Exception) -> JSONResponse:
    """Answers what the table knows."""
    kind = type(error)
    field = error.field if isinstance(error, RefusedError) else FIELDS.get(kind)
    status, name = TABLE[kind]
    return _answer(status, name, str(error), field)


async def on_unknown(request: Request, error: Exception) -> JSONResponse:
    """Answers a fault of ours; the log has its trace."""
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(500, "InternalServerError", "the server failed; its log says why")


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error of `app` the same shape."""
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    for kind in TABLE:
        app.add_exception_handler(kind, on_known)
    app.add_exception_handler(Exception, on_unknown)
