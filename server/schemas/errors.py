"""The body of every error."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

KINDS = {404: "NotFoundError", 408: "TimeoutError", 429: "RateLimitError", 503: "ServiceUnavailableError"}
"""Of what the framework, and what reads bodies, refuse by status; any other is a BadRequestError."""

MAX_MESSAGE = 32768
"""Characters: more than all faults of an adapter that are told."""


def kind_of(status: int) -> str:
    """Return the `type` of an error that only its status tells."""
    return KINDS.get(status, "BadRequestError")


class ErrorDetail(BaseModel):
    """What was wrong: `param` is the field, where it was one; `faults` are the first of an adapter that is not sound, and how
    many more there are."""

    message: str
    type: str
    param: str | None
    code: int
    faults: list[str] | None = None


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def error_reply(status: int, kind: str, message: str, param: str | None, faults: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the body of an error. A message may quote what the client sent, be it text or not."""
    found = None if faults is None else list(map(_sound, faults))
    detail = ErrorDetail(message=_sound(message[:MAX_MESSAGE]), type=kind, param=param, code=status, faults=found)
    return ErrorReply(error=detail).model_dump(exclude={} if found else {"error": {"faults"}})


def _sound(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
