"""The sender of a request and its rights. Plain values; knows no HTTP and no file."""

import re
from dataclasses import dataclass, field
from fnmatch import translate

NO_KEYS = (
    "this route needs an admin's key, and the server has no keys: make one with `python -m server.keys keys.toml --role admin`, "
    "and start the server with --keys keys.toml (in Docker with docker/compose.keys.yaml)"
)
"""The error message for a request to change adapters when the server has no keys."""


class ForbiddenError(Exception):
    """The caller's key does not allow the request."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request and its rights. On a server without keys, every sender is the default `Caller()`."""

    tenant: str = ""
    key_id: str = ""
    """A short public name of the key, for the log. Never the key itself."""
    is_admin: bool = False
    """Whether the caller may change adapters. An admin also sees all of them."""
    is_monitor: bool = False
    """Whether the caller may read /metrics."""
    allowed: tuple[str, ...] = ("*",)
    """Patterns of the adapter names that the caller may use: `*`, `?`, `[abc]`."""
    policy: tuple[tuple[str, float], ...] = ()
    """Adapters that the operator adds to all of the caller's requests: references and weights."""
    priority: int = 0
    """A lower value runs earlier."""
    requests_per_minute: int | None = None
    """The limit of the caller's tenant, over all its keys."""
    max_requests: int | None = None
    """The most answers that the caller's tenant may have under way at once."""
    max_request_s: float | None = None
    """The longest that one request may take, in seconds. Only counts where it is less than the server's own limit."""
    max_request_tokens: int | None = None
    """The most tokens of one request, over all its answers. Only counts where it is less than the server's own limit."""
    _allowed: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_allowed", re.compile("|".join(map(translate, self.allowed)) or "(?!)"))

    def may_use(self, name: str) -> bool:
        """Return whether the caller may use, and see, the adapter called `name`."""
        return self._allowed.match(name) is not None
