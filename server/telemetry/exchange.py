"""One HTTP request and its answer, as the log and the traces need it. Code that works for the request finds it in the context."""

from collections.abc import MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from server.telemetry.account import Account


@dataclass(slots=True)
class Exchange:
    """An HTTP request under way, and the accounts of its admitted requests, in that order."""

    id: str
    accounts: list[Account] = field(default_factory=list)
    scope: MutableMapping[str, Any] | None = None
    """The ASGI scope as it reached the routes; None if it did not."""
    refusal: dict[str, str] = field(default_factory=dict)
    """Fields of the log line that say why a route refused the request. No text of a prompt."""


current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""The exchange of the request that the running task works for."""
