"""The body of every error."""

from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What was wrong: `param` is the field, where it was one."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def error_reply(status: int, kind: str, message: str, param: str | None) -> dict[str, Any]:
    """Returns the body of an error. A message may quote what the client sent, be it text or not."""
    sound = message.encode("utf-8", "backslashreplace").decode()
    return ErrorReply(error=ErrorDetail(message=sound, type=kind, param=param, code=status)).model_dump()
