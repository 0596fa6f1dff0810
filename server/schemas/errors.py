"""The body of every error."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

KINDS = {404: "NotFoundError", 408: "TimeoutError", 429: "RateLimitError", 503: "ServiceUnavailableError"}
"""Types of the errors that the framework, and the readers of bodies, raise by status. Any other is a BadRequestError."""

MAX_MESSAGE = 32768
"""Maximum number of characters of a message: more than all faults of an adapter that are reported."""


def kind_of(status: int) -> str:
    """Return the `type` of an error that has only a status."""
    return KINDS.get(status, "BadRequestError")


class ErrorDetail(BaseModel):
    """An error.

    `param` is the field at fault, if there is one. `faults` are the first faults of an adapter that is not sound, and the number
    of further ones.
    """

    message: str
    type: str
    param: str | None
    code: int
    faults: list[str] | None = None


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def error_reply(status: int, kind: str, message: str, param: str | None, faults: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the body of an error. The message may quote what the client sent, even if that is not valid text."""
    shown_faults = None if faults is None else list(map(_sound, faults))
    detail = ErrorDetail(message=_sound(message[:MAX_MESSAGE]), type=kind, param=param, code=status, faults=shown_faults)
    return ErrorReply(error=detail).model_dump(exclude={} if shown_faults else {"error": {"faults"}})


def _sound(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
