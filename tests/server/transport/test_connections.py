"""The bound of connections: a further one replaces an idle one, or is refused with 503."""

import json
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import uvicorn

from server.transport import sockets
from server.transport.connections import MAX_LINGERING, PATIENCE_S, IdleConnections
from server.transport.sockets import RESERVE, connection_room
from tests.server.forked import start_forked
from tests.server.live import LIMIT_S, Live, wait_until

MAX_CONNECTIONS = 4
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@pytest.fixture(scope="module")
def narrow(writer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    flags = ["--model", str(writer_model), "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.02"]
    flags += ["--max-body-s", "3600"]  # bodies stay half sent for as long as a busy machine needs
    with start_forked(tmp_path_factory.mktemp("narrow") / "log", *flags, "--max-connections", str(MAX_CONNECTIONS)) as live:
        live.client.close()
        yield live


@contextmanager
def opened(live: Live) -> Iterator[socket.socket]:
    """Open a connection. When the block ends, wait until the server has closed it, too, and no longer counts it."""
    with closing(socket.create_connection(("127.0.0.1", live.port), timeout=LIMIT_S)) as connection:
        yield connection
        with suppress(OSError):  # the server may have reset it
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass


def answered(connection: socket.socket, sent: bytes = HEALTH) -> bytes:
    """Send a request and return the answer; empty if the connection was closed."""
    try:
        connection.sendall(sent)
        return read_answer(connection)
    except ConnectionError:
        return b""


def read_answer(connection: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        if not (part := connection.recv(1)):
            return head
        head += part
    [length] = re.findall(rb"content-length: (\d+)", head)
    return head + connection.recv(int(length), socket.MSG_WAITALL)


def is_refused(connection: socket.socket) -> bool:
    return answered(connection).startswith(b"HTTP/1.1 503 ")


def test_a_connection_beyond_the_limit_is_answered_503_and_closed(narrow: Live) -> None:
    with ExitStack() as busy:
        connections = [busy.enter_context(opened(narrow)) for _ in range(MAX_CONNECTIONS)]
        for connection in connections[1:]:
            connection.sendall(HALF)  # these are not idle
        healthy = connections[0]
        assert b'{"status":"ok"}' in answered(healthy)
        healthy.sendall(HALF)
        with opened(narrow) as connection:
            heard = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = heard.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"connection: close" in head
        assert b"retry-after: 1" in head
        error = json.loads(body)["error"]
        assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
        assert "--max-connections" in error["message"]
        for _ in range(2 * MAX_LINGERING):  # each is closed at once, so that none lingers
            with opened(narrow) as connection:
                assert is_refused(connection)
        for connection in connections:  # the first connections are answered
            assert answered(connection, b" " * 100).startswith(b"HTTP/1.1 400 ")

    def is_open() -> bool:
        with opened(narrow) as connection:
            return b'{"status":"ok"}' in answered(connection)

    wait_until(is_open, "room for a connection")
    assert narrow.log.read_text().count("connections are refused") == 1


def test_idle_connections_make_room(narrow: Live) -> None:
    with ExitStack() as idle:
        busy, first, second, third = (idle.enter_context(opened(narrow)) for _ in range(MAX_CONNECTIONS))
        busy.sendall(HALF)

        def is_open() -> bool:
            with opened(narrow) as connection:
                return b'{"status":"ok"}' in answered(connection)

        wait_until(is_open, "an idle connection that is closed for a new one")
        assert first.recv(10) == b""
        assert answered(busy, b" " * 100).startswith(b"HTTP/1.1 400 ")
        assert b'{"status":"ok"}' in answered(third)
        assert second.fileno() > 0


class FakeConnection:
    """A fake connection, idle or not."""

    ordinal = 0

    def __init__(self, cycle: SimpleNamespace | None = None, *, has_sent: bool = False, is_closing: bool = False) -> None:
        self.client, self._own = socket.socketpair()
        self.cycle, self.is_shut = cycle, False
        self.transport = SimpleNamespace(get_extra_info=lambda _: self._own, is_closing=lambda: is_closing)
        if has_sent:
            self.client.send(b"GET")

    def shutdown(self) -> None:
        self.is_shut = True

    def close(self) -> None:
        self.client.close()
        self._own.close()


def server_with(connections: set[FakeConnection]) -> uvicorn.Server:
    return cast(uvicorn.Server, SimpleNamespace(server_state=SimpleNamespace(connections=connections)))


def test_the_connection_that_is_idle_longest_is_closed_and_no_busy_one() -> None:
    clock = [0.0]
    answering, sending, leaving = SimpleNamespace(response_complete=False), None, SimpleNamespace(response_complete=True)
    first, busy, coming, gone, second, new = made = [
        FakeConnection(),
        FakeConnection(answering),
        FakeConnection(sending, has_sent=True),
        FakeConnection(leaving, is_closing=True),
        FakeConnection(SimpleNamespace(response_complete=True)),
        FakeConnection(),
    ]
    connections: set[FakeConnection] = set()
    waiting = IdleConnections(server_with(connections), lambda: clock[0])
    assert not waiting.close_longest()
    for connection in made:
        connections.add(connection)
        waiting.scan()
        clock[0] += PATIENCE_S
    first.cycle = SimpleNamespace(response_complete=False)  # it has received a request since
    assert waiting.close_longest()
    assert second.is_shut
    assert waiting.close_longest()
    assert new.is_shut
    assert not waiting.close_longest()
    assert not any(connection.is_shut for connection in (first, busy, coming, gone))
    waiting.scan()
    for connection in made:
        connection.close()


def test_of_connections_first_seen_by_the_same_scan_the_oldest_is_closed() -> None:
    clock = [0.0]
    made = [FakeConnection() for _ in range(16)]
    for ordinal, connection in enumerate(made):
        connection.ordinal = ordinal
    waiting = IdleConnections(server_with(set(made)), lambda: clock[0])
    waiting.scan()
    clock[0] += PATIENCE_S
    for num_shut in range(1, len(made) + 1):
        assert waiting.close_longest()
        assert [connection.is_shut for connection in made] == [True] * num_shut + [False] * (len(made) - num_shut)
    for connection in made:
        connection.close()


def test_a_connection_that_was_just_made_is_not_closed_for_another() -> None:
    connection = FakeConnection()
    waiting = IdleConnections(server_with({connection}), lambda: 5.0)
    waiting.scan()
    assert not waiting.close_longest()
    connection.close()


@pytest.mark.parametrize(
    ("soft", "wanted", "room"),
    [(1024, 4096, 1024 - RESERVE), (200, 4096, 100), (100_000, 4096, 4096), (resource.RLIM_INFINITY, 4096, 4096)],
)
def test_there_are_no_more_connections_than_descriptors_for_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, soft: int, wanted: int, room: int
) -> None:
    monkeypatch.setattr(sockets.resource, "getrlimit", lambda _: (soft, soft))
    assert connection_room(wanted) == room
    assert ("--max-connections is 4096" in caplog.text) == (room < wanted)
