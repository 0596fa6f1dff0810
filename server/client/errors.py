"""The errors of the clients.

ClientError
├── ConnectionFailedError     no answer, or the connection ended before the reply did, or before a stream's first event
│   └── BrokenStreamError     the connection ended between the first event of a stream and the last
├── SilenceError              the server sent nothing for as long as the client waits
├── UnexpectedReplyError      the reply is not this server's, or of a kind that this client does not know
└── ApiError                  the server refused, or failed, and sent the reason
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
    """Root of the tree of errors that a client raises."""


class ConnectionFailedError(ClientError):
    """There was no answer, or the connection ended before the reply did."""


class BrokenStreamError(ConnectionFailedError):
    """A stream ended after its first event, and before its answers did."""


class SilenceError(ClientError, TimeoutError):
    """The server sent nothing for as long as the client waits."""


class UnexpectedReplyError(ClientError):
    """The reply is not one of this server."""


class ApiError(ClientError):
    """An error that the server sent. `detail` has all its fields.

    `param` is the field at fault, if there is one. `retry_after` is the number of seconds after which to retry.
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
    """The key is missing or unknown."""


class ForbiddenError(ApiError):
    """The key does not allow the request."""


class NotFoundError(ApiError):
    """There is no such adapter, model or route."""


class ConflictError(ApiError):
    """The request conflicts with the present state, such as a name that is in use."""


class RateLimitError(ApiError):
    """The server, or the key's tenant, has too many requests."""


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
"""The type of an error that this server did not send, but a gateway."""
MAX_QUOTED = 200


def refused(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """Return the error of an unsuccessful response, from this server or from a gateway before it."""
    try:
        detail = ErrorReply.model_validate_json(body).error
    except ValidationError:
        quoted = body[:MAX_QUOTED].decode(errors="replace").strip()
        detail = ErrorDetail(message=quoted or "an empty reply", type=UNKNOWN, param=None, code=status)
    return failed(detail.model_copy(update={"code": status}), _seconds(headers.get("retry-after")))


def failed(detail: ErrorDetail, retry_after: float | None = None) -> ApiError:
    """Return the error for the server's `detail`."""
    default = ServerError if detail.code >= 500 else ApiError
    return BY_STATUS.get(detail.code, default)(detail, retry_after)


def _seconds(value: str | None) -> float | None:
    # HTTP also allows a date, which this server never sends.
    return float(value) if value and value.isascii() and value.isdigit() else None
