"""What a client raises.

ClientError
├── ConnectionFailedError     nobody answered, or the connection ended before the reply did, or before a stream's first event
│   └── BrokenStreamError     it ended between the first event of a stream and the last
├── SilenceError              the server said nothing for as long as the client waits
├── UnexpectedReplyError      what answered is not this server, or speaks of what this client does not know
└── ApiError                  the server refused, or failed, and said why
    ├── BadRequestError       400
    ├── UnauthenticatedError  401
    ├── ForbiddenError        403
    ├── NotFoundError         404
    ├── ConflictError         409
    ├── RateLimitError        429
    └── ServerError           500 and above
        └── UnavailableError  503
"""

from collections.abc import Mapping

from pydantic import ValidationError

from server.schemas.errors import ErrorDetail, ErrorReply


class ClientError(Exception):
    """Anything that a client raises."""


class ConnectionFailedError(ClientError):
    """Nobody answered, or the connection ended before the reply did."""


class BrokenStreamError(ConnectionFailedError):
    """A stream ended after its first event, and before its answers did."""


class SilenceError(ClientError, TimeoutError):
    """The server said nothing for as long as the client waits."""


class UnexpectedReplyError(ClientError):
    """The reply is none of this server's."""


class ApiError(ClientError):
    """The server's own words: `detail` is all of them.

    `param` is the field that is wrong, where one is; `retry_after` says after how many seconds to come again.
    """

    def __init__(self, detail: ErrorDetail, retry_after: float | None = None) -> None:
        super().__init__(detail, retry_after)
        self.status, self.type, self.message, self.param = detail.code, detail.type, detail.message, detail.param
        self.detail, self.retry_after = detail, retry_after

    def __str__(self) -> str:
        return f"{self.status} {self.type}: {self.message}"


class BadRequestError(ApiError):
    """The request cannot be answered as it is."""


class UnauthenticatedError(ApiError):
    """There is no key, or an unknown one."""


class ForbiddenError(ApiError):
    """The key is not good for this."""


class NotFoundError(ApiError):
    """There is no such adapter, model or route."""


class ConflictError(ApiError):
    """What is there already, or in use, forbids it."""


class RateLimitError(ApiError):
    """Too many requests for the server, or for the key."""


class ServerError(ApiError):
    """The server failed."""


class UnavailableError(ServerError):
    """The server cannot answer now."""


BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequestError,
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    429: RateLimitError,
    503: UnavailableError,
}
UNKNOWN = "UnknownError"
"""The type of what this server did not say: a gateway did."""
MAX_QUOTED = 200


def refused(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """Return the error of a reply that is no success, be it this server's or that of a gateway before it."""
    try:
        detail = ErrorReply.model_validate_json(body).error
    except ValidationError:
        quoted = body[:MAX_QUOTED].decode(errors="replace").strip()
        detail = ErrorDetail(message=quoted or "an empty reply", type=UNKNOWN, param=None, code=status)
    return failed(detail.model_copy(update={"code": status}), _seconds(headers.get("retry-after")))


def failed(detail: ErrorDetail, retry_after: float | None = None) -> ApiError:
    """Return the error that the server speaks of."""
    usual = ServerError if detail.code >= 500 else ApiError
    return BY_STATUS.get(detail.code, usual)(detail, retry_after)


def _seconds(value: str | None) -> float | None:
    # A date, which is allowed too, is not this server's form.
    return float(value) if value and value.isascii() and value.isdigit() else None
