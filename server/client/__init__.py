"""Python client of this server: `Client`, and `AsyncClient` for asyncio. Needs httpx and pydantic, but no torch."""

from server.client.adapter_calls import AdapterFiles
from server.client.async_client import AsyncClient
from server.client.client import Client
from server.client.errors import (
    ApiError,
    BadRequestError,
    BrokenStreamError,
    ClientError,
    ConflictError,
    ConnectionFailedError,
    ForbiddenError,
    NotFoundError,
    RateLimitError,
    ServerError,
    SilenceError,
    UnauthenticatedError,
    UnavailableError,
    UnexpectedReplyError,
)
from server.client.events import StreamEvent
from server.schemas.generation import DoneData, TokenData

__all__ = [
    "AdapterFiles",
    "ApiError",
    "AsyncClient",
    "BadRequestError",
    "BrokenStreamError",
    "Client",
    "ClientError",
    "ConflictError",
    "ConnectionFailedError",
    "DoneData",
    "ForbiddenError",
    "NotFoundError",
    "RateLimitError",
    "ServerError",
    "SilenceError",
    "StreamEvent",
    "TokenData",
    "UnauthenticatedError",
    "UnavailableError",
    "UnexpectedReplyError",
]
