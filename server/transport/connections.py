"""Which connections wait for a request, and since when: uvicorn knows it of each, but ends none that sends half a head."""

import asyncio
import selectors
import time
from collections.abc import Callable, Iterable
from typing import Protocol, cast

import uvicorn

PATIENCE_S = 1.0
"""For a connection of which something has come just as it should be closed."""
WITHOUT_DESCRIPTOR = getattr(selectors, "PollSelector", selectors.SelectSelector)
"""The default would open one, and there may be none left."""


class Cycle(Protocol):
    """uvicorn's word for one request of a connection and its answer."""

    response_complete: bool


class Connection(Protocol):
    """What is needed of uvicorn's HTTP protocols."""

    cycle: Cycle | None
    """The last one; there is none before the first head was read."""
    transport: asyncio.Transport

    def shutdown(self) -> None:
        """Closes the connection, now where it waits."""


class HasFileno(Protocol):
    """A socket, or what uvloop gives for one."""

    def fileno(self) -> int:
        """The system's number of it."""


class Waiting:
    """Watches the connections of a server that wait for a request; knows what `look` saw."""

    def __init__(self, server: uvicorn.Server, clock: Callable[[], float] = time.monotonic) -> None:
        self._server, self._clock = server, clock
        self._since: dict[Connection, tuple[Cycle | None, float]] = {}

    def look(self) -> None:
        """Notes who waits now."""
        now, before = self._clock(), self._since
        self._since = {}
        for each in self._connections():
            if each.cycle is None or each.cycle.response_complete:
                known = before.get(each)
                self._since[each] = known if known and known[0] is each.cycle else (each.cycle, now)

    def close(self, seconds: float) -> None:
        """Closes those that have waited so long; where a request may be just coming, a little later."""
        now = self._clock()
        for connection, (_, since) in self._since.items():
            left = since + seconds - now
            if left <= -PATIENCE_S or (left <= 0 and not is_readable(connection.transport.get_extra_info("socket"))):
                connection.shutdown()

    def _connections(self) -> Iterable[Connection]:
        # A web socket's connection has no cycle.
        return [cast(Connection, each) for each in self._server.server_state.connections if hasattr(each, "cycle")]


def is_readable(of: HasFileno) -> bool:
    """Whether something has come that nobody has taken: bytes, the end, or on a socket that listens a connection."""
    with WITHOUT_DESCRIPTOR() as selector:
        try:
            selector.register(of.fileno(), selectors.EVENT_READ)
        except (ValueError, OSError):
            return False  # it is closed
        return bool(selector.select(0))
