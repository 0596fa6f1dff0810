"""Open connections: their number is bounded, and those that wait too long for a request are closed.

uvicorn never closes one that sends half of its headers.
"""

import asyncio
import json
import logging
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Protocol, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from server.schemas.errors import error_reply, kind_of

logger = logging.getLogger(__name__)
PATIENCE_S = 1.0
"""Extra time for an idle connection on which bytes have just arrived."""
WITHOUT_DESCRIPTOR = getattr(selectors, "PollSelector", selectors.SelectSelector)
"""The default would open one, and there may be none left."""
LINGER_S = 1.0
"""For a client that is refused to read why: closing while it sends would reset the connection."""
MAX_LINGERING = 64
"""Refused connections that are kept so long; one more is closed at once."""
QUIET_S = 60.0
"""Between two lines of the log that say so."""


class Cycle(Protocol):
    """uvicorn's word for one request of a connection and its answer."""

    response_complete: bool


class Connection(Protocol):
    """What is needed of uvicorn's HTTP protocols."""

    cycle: Cycle | None
    """The last one; there is none before the first head was read."""
    transport: asyncio.Transport
    ordinal: int
    """Less than that of every connection which was made later."""

    def shutdown(self) -> None:
        """Close the connection, now where it waits."""


class HasFileno(Protocol):
    """A socket, or what uvloop gives for one."""

    def fileno(self) -> int:
        """The system's number of it."""


class Waiting:
    """Watches the connections of a server that wait for a request; knows what `look` saw."""

    def __init__(self, server: uvicorn.Server, clock: Callable[[], float] = time.monotonic) -> None:
        self._server, self._clock = server, clock
        self._since: dict[Connection, tuple[Cycle | None, float]] = {}
        self._by_age: deque[tuple[Connection, tuple[Cycle | None, float]]] | None = None
        """Those of the last look that were not closed for others, the longest first; None where nobody has asked since."""

    def look(self) -> None:
        """Note who waits now."""
        now, before = self._clock(), self._since
        self._since, self._by_age = {}, None
        for each in self._connections():
            if _is_waiting(each):
                known = before.get(each)
                self._since[each] = known if known and known[0] is each.cycle else (each.cycle, now)

    def close(self, seconds: float) -> None:
        """Close those that have waited so long; where a request may be just coming, a little later."""
        now = self._clock()
        for connection, (_, since) in self._since.items():
            left = since + seconds - now
            if left <= -PATIENCE_S or (left <= 0 and not is_readable(connection.transport.get_extra_info("socket"))):
                connection.shutdown()

    def close_longest(self) -> bool:
        """Close the connection that has waited longest for a request, to make room. Return whether there was one that had waited
        for `PATIENCE_S` when `look` last saw it, and waits still."""
        if self._by_age is None:
            # Those that the same look saw first began in the order in which they were made.
            self._by_age = deque(sorted(self._since.items(), key=lambda item: (item[1][1], item[0].ordinal)))
        while self._by_age and self._by_age[0][1][1] <= self._clock() - PATIENCE_S:
            connection, (cycle, _) = self._by_age.popleft()
            is_same = connection.cycle is cycle and _is_waiting(connection) and not connection.transport.is_closing()
            if is_same and not is_readable(connection.transport.get_extra_info("socket")):
                connection.shutdown()
                return True
        return False

    def _connections(self) -> Iterable[Connection]:
        # A web socket's connection has no cycle.
        return [cast(Connection, each) for each in self._server.server_state.connections if hasattr(each, "cycle")]


def _is_waiting(connection: Connection) -> bool:
    return connection.cycle is None or connection.cycle.response_complete


class BoundedState(ServerState):
    """uvicorn's state of a server, with at most `max_connections`.

    One more takes the place of the one that has waited longest for a request; where none waits, it is answered 503 and closed.
    """

    def __init__(self, max_connections: int, waiting: Waiting) -> None:
        super().__init__()
        self._max_connections, self._waiting = max_connections, waiting
        self.num_lingering = 0
        self._next_line = -QUIET_S

    def admit(self, connection: HttpToolsProtocol) -> None:
        """Keep a connection that was just made and is one of `connections`, or refuse it."""
        if len(self.connections) <= self._max_connections or self._waiting.close_longest():
            return
        self.connections.discard(connection)
        _Refused(self, connection.transport)
        if (now := time.monotonic()) >= self._next_line:
            self._next_line = now + QUIET_S
            logger.warning("connections are refused: there are %d (--max-connections), and none is idle", self._max_connections)


class _Refused(asyncio.Protocol):
    # A connection that was answered, and whose bytes are dropped until its client leaves, or has had time to read why.

    def __init__(self, state: BoundedState, transport: asyncio.Transport) -> None:
        self._state = state
        state.num_lingering += 1
        transport.set_protocol(self)
        transport.write(BUSY)
        if state.num_lingering > MAX_LINGERING or not transport.can_write_eof():
            transport.close()
        else:
            transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER_S, transport.abort)

    def connection_lost(self, _: Exception | None) -> None:
        self._state.num_lingering -= 1


def raw_error(status: HTTPStatus, message: str, *headers: str) -> bytes:
    """Return a whole HTTP/1.1 error response that ends the connection; for errors that no application answers."""
    body = json.dumps(error_reply(status, kind_of(status), message, None)).encode()
    lines = (f"HTTP/1.1 {status:d} {status.phrase}", "content-type: application/json", f"content-length: {len(body)}")
    return "\r\n".join((*lines, *headers, "connection: close", "", "")).encode() + body


BUSY = raw_error(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "the server has as many connections as it may (--max-connections), and none is idle; try again",
    "retry-after: 1",
)


def is_readable(of: HasFileno) -> bool:
    """Whether something has come that nobody has taken: bytes, the end, or on a socket that listens a connection."""
    with WITHOUT_DESCRIPTOR() as selector:
        try:
            selector.register(of.fileno(), selectors.EVENT_READ)
        except (ValueError, OSError):
            return False  # it is closed
        return bool(selector.select(0))
