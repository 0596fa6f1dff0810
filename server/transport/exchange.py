"""One HTTP request and its answer, as far as they are told of afterwards. What works for it finds it in the context."""

from collections.abc import MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from server.telemetry.account import Account


@dataclass(slots=True)
class Exchange:
    """An HTTP request under way, and the accounts of what was admitted for it, in that order."""

    id: str
    accounts: list[Account] = field(default_factory=list)
    scope: MutableMapping[str, Any] | None = None
    """ASGI's, as it reached the routes; None where it did not."""


current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""Of the request that the running task works for."""
