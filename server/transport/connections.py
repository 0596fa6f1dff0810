"""Open connections: their number is limited, and those that wait too long for a request are closed.

uvicorn never closes a connection that has sent half of its headers.
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
"""Extra seconds for an idle connection on which bytes have just arrived."""
WITHOUT_DESCRIPTOR = getattr(selectors, "PollSelector", selectors.SelectSelector)
"""A selector without a file descriptor: the default one opens one, and there may be none left."""
LINGER_S = 1.0
"""Seconds in which a refused client can read why: closing while it sends would reset the connection."""
MAX_LINGERING = 64
"""Refused connections that linger. One more is closed at once."""
LOG_INTERVAL_S = 60.0
"""Seconds between two log lines about refused connections."""


class Cycle(Protocol):
    """uvicorn's term for one request of a connection and its answer."""

    response_complete: bool


class Connection(Protocol):
    """The part of uvicorn's HTTP protocols that is used."""

    cycle: Cycle | None
    """The last cycle; None before the headers of the first request."""
    transport: asyncio.Transport
    ordinal: int
    """Smaller than that of every later connection."""

    def shutdown(self) -> None:
        """Close the connection, at once if it waits."""


class HasFileno(Protocol):
    """A socket, or uvloop's substitute for one."""

    def fileno(self) -> int:
        """Return the file descriptor."""


class IdleConnections:
    """The connections of a server that wait for a request, as of the last `scan`."""

    def __init__(self, server: uvicorn.Server, clock: Callable[[], float] = time.monotonic) -> None:
        self._server, self._clock = server, clock
        self._since: dict[Connection, tuple[Cycle | None, float]] = {}
        self._by_age: deque[tuple[Connection, tuple[Cycle | None, float]]] | None = None
        """Connections of the last scan that are still candidates to be closed, the oldest first; None until they are needed."""

    def scan(self) -> None:
        """Note the connections that wait now."""
        now, previous = self._clock(), self._since
        self._since, self._by_age = {}, None
        for connection in self._connections():
            if _is_waiting(connection):
                last_seen = previous.get(connection)
                self._since[connection] = last_seen if last_seen and last_seen[0] is connection.cycle else (connection.cycle, now)

    def close(self, seconds: float) -> None:
        """Close connections that have waited for `seconds`. If a request may just be arriving, a little later."""
        now = self._clock()
        for connection, (_, since) in self._since.items():
            remaining_s = since + seconds - now
            if remaining_s <= -PATIENCE_S or (
                remaining_s <= 0 and not is_readable(connection.transport.get_extra_info("socket"))
            ):
                connection.shutdown()

    def close_longest(self) -> bool:
        """Close the connection that has waited longest for a request, to make room.

        Return whether a connection was closed. It must have waited for `PATIENCE_S` at the last scan, and must still wait.
        """
        if self._by_age is None:
            # Connections that the same scan saw first are ordered by their creation.
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
        return [
            cast(Connection, connection) for connection in self._server.server_state.connections if hasattr(connection, "cycle")
        ]


def _is_waiting(connection: Connection) -> bool:
    return connection.cycle is None or connection.cycle.response_complete


class BoundedState(ServerState):
    """uvicorn's state of a server, with at most `max_connections`.

    One more connection replaces the one that has waited longest for a request. If none waits, it is answered 503 and closed.
    """

    def __init__(self, max_connections: int, waiting: IdleConnections) -> None:
        super().__init__()
        self._max_connections, self._idle = max_connections, waiting
        self.num_lingering = 0
        self._next_line = -LOG_INTERVAL_S

    def admit(self, connection: HttpToolsProtocol) -> None:
        """Admit a connection that was just made and is one of `connections`, or refuse it."""
        if len(self.connections) <= self._max_connections or self._idle.close_longest():
            return
        self.connections.discard(connection)
        _RefusedConnection(self, connection.transport)
        if (now := time.monotonic()) >= self._next_line:
            self._next_line = now + LOG_INTERVAL_S
            logger.warning("connections are refused: there are %d (--max-connections), and none is idle", self._max_connections)


class _RefusedConnection(asyncio.Protocol):
    # A refused connection: it was answered, and its bytes are dropped until the client leaves or had time to read the answer.

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
    """Return a whole HTTP/1.1 error response that closes the connection. For errors that no application answers."""
    body = json.dumps(error_reply(status, kind_of(status), message, None)).encode()
    lines = (f"HTTP/1.1 {status:d} {status.phrase}", "content-type: application/json", f"content-length: {len(body)}")
    return "\r\n".join((*lines, *headers, "connection: close", "", "")).encode() + body


BUSY = raw_error(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "the server has as many connections as it may (--max-connections), and none is idle; try again",
    "retry-after: 1",
)


def is_readable(sock: HasFileno) -> bool:
    """Return whether something has arrived that was not read: bytes, the end, or a connection on a listening socket."""
    with WITHOUT_DESCRIPTOR() as selector:
        try:
            selector.register(sock.fileno(), selectors.EVENT_READ)
        except (ValueError, OSError):
            return False  # closed
        return bool(selector.select(0))
