"""Who sends a request, and what he may do. Plain values; no HTTP, no file."""

import re
from dataclasses import dataclass, field
from fnmatch import translate

NO_KEYS = (
    "this route needs an admin's key, and the server has no keys: make one with `python -m server.keys keys.toml --role admin`, "
    "and start the server with --keys keys.toml (in Docker with docker/compose.keys.yaml)"
)
"""What is said to who would change adapters where nobody may."""


class ForbiddenError(Exception):
    """The caller's key does not allow what he asks for."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: anybody, where the server has no keys."""

    tenant: str = ""
    key_id: str = ""
    """A short public name of the key, for the log: never the key."""
    is_admin: bool = False
    """May change adapters, and sees all of them."""
    is_monitor: bool = False
    """May read /metrics."""
    allowed: tuple[str, ...] = ("*",)
    """Patterns of the names of adapters that it may use: `*`, `?`, `[abc]`."""
    policy: tuple[tuple[str, float], ...] = ()
    """Adapters that the operator adds to all its requests, as references, and their weights."""
    priority: int = 0
    """Lower runs earlier."""
    requests_per_minute: int | None = None
    """Of its tenant, with whatever key."""
    max_requests: int | None = None
    """Under way at once, of its tenant."""
    max_request_s: float | None = None
    """The longest that one of its requests may take, where that is less than the server's own."""
    max_request_tokens: int | None = None
    """The same of tokens, of all answers to it together."""
    _allowed: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_allowed", re.compile("|".join(map(translate, self.allowed)) or "(?!)"))

    def may_use(self, name: str) -> bool:
        """Return whether it may use, and see, the adapter of this name."""
        return self._allowed.match(name) is not None
