"""Errors that refuse a request, and the one table that maps them to statuses."""

from collections.abc import Sequence

from starlette.exceptions import HTTPException

from lori.errors import AdapterFormatError, TemplateError, UnknownAdapterError
from server.access.caller import ForbiddenError
from server.access.limits import RateLimitedError
from server.engine.adapters.registry import AmbiguousVersionError, FaultyAdapterError, PolicyError
from server.engine.generate_request import RefusedError
from server.engine.grammar import CrowdedError
from server.engine.request import ErrorEvent, ErrorKind
from server.engine.thread import EngineDeadError
from server.schemas.errors import ErrorReply, error_reply
from server.schemas.model_names import ModelWeightsError, UnknownModelError


class BusyError(Exception):
    """The server cannot take the request now. The same request may succeed later."""


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


class UnknownMergeError(Exception):
    """No named merge has the name."""


class IncompleteMergeError(Exception):
    """A named merge needs adapters that the server does not have, or that are damaged."""

    def __init__(self, name: str, references: Sequence[str]) -> None:
        super().__init__(f"the merge {name!r} needs {', '.join(references)}, which the server cannot serve")


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
    UnknownMergeError: (404, "NotFoundError"),
    IncompleteMergeError: (404, "NotFoundError"),
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
    UnknownMergeError: "name",
    IncompleteMergeError: "adapter",
    ModelWeightsError: "model",
}
"""Fields at fault, by error."""


def failure_reply(event: ErrorEvent) -> ErrorReply:
    """Return the error event of a stream for a failure of the engine."""
    return ErrorReply.model_validate(error_reply(*TABLE[FAILURES[event.kind]], event.message, None))
