"""Clients that send half a request, nothing, or without end: none holds memory or a place for long."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import uvicorn
from transformers import PreTrainedTokenizerFast

from server.transport.connections import IdleConnections
from server.transport.http_protocol import MAX_HELD_BYTES
from tests.server.fake_service import served
from tests.server.forked import start_forked
from tests.server.live import LIMIT_S, Live, events
from tests.server.rig import FakeEngine

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def heard_to_the_end(connection: socket.socket) -> bytes:
    """Return all bytes that a server sends until it closes the connection."""
    connection.settimeout(LIMIT_S)
    return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.slow
@pytest.mark.parametrize("framing", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5\r\n"])
@pytest.mark.parametrize("begun", [b"", b'{"pro'])
def test_a_body_that_stalls_is_408_and_ends_its_connection(
    tokenizer: PreTrainedTokenizerFast, framing: bytes, begun: bytes
) -> None:
    with served(tokenizer, FakeEngine(), max_body_s=0.2) as (client, service):
        with closing(socket.create_connection((client.base_url.host, client.base_url.port or 0))) as connection:
            connection.sendall(HEAD + framing + begun)
            head, _, body = heard_to_the_end(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head.lower()
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("TimeoutError", 408)
        assert error["message"] == "the body did not come whole within 0.2 s (--max-body-s) and a second for each 131072 bytes"
        assert service.num_requests == 0
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200


@pytest.mark.slow
def test_a_body_that_drips_is_bounded_as_a_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    with served(tokenizer, FakeEngine(), max_body_s=0.5) as (client, _):
        with closing(socket.create_connection((client.base_url.host, client.base_url.port or 0))) as connection:
            connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
            connection.setblocking(False)
            heard, started = b"", time.monotonic()
            while not heard and time.monotonic() < started + LIMIT_S:
                connection.sendall(b" ")
                time.sleep(0.02)  # much shorter than the limit, in case every byte restarted it
                try:
                    heard = connection.recv(4096)
                except BlockingIOError:
                    continue
        assert heard.startswith(b"HTTP/1.1 408 ")


@pytest.mark.slow
def test_the_body_s_time_limit_does_not_cover_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Wait longer than `max_body_s` for the engine, and for a disconnect of the client, after the body has arrived."""
    with served(tokenizer, FakeEngine(num_steps=500), max_body_s=0.1) as (client, _):
        for is_stream in (False, True):
            reply = client.post("/generate", json={"prompt": "x", "stream": is_stream})
            assert reply.status_code == 200
            assert reply.text.count("x") >= 500


@pytest.fixture(scope="module")
def impatient(writer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    flags = ["--model", str(writer_model), "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.02"]
    with start_forked(tmp_path_factory.mktemp("impatient") / "log", *flags, "--keep-alive-s", "0.5") as live:
        yield live


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET /health HT", id="half a line"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: x\r\n", id="half a head"),
        pytest.param(b"\r\n\r\n\r\n", id="empty lines"),
    ],
)
def test_a_connection_without_a_request_is_closed(impatient: Live, sent: bytes) -> None:
    with closing(socket.create_connection(("127.0.0.1", impatient.port))) as connection:
        connection.sendall(sent)
        assert heard_to_the_end(connection) == b""


def test_a_connection_is_closed_some_time_after_its_answer(impatient: Live) -> None:
    with closing(socket.create_connection(("127.0.0.1", impatient.port))) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert heard_to_the_end(connection).endswith(b'{"status":"ok"}')


def drip(connection: socket.socket, drop: bytes = b" ") -> None:
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        connection.sendall(drop)
        time.sleep(0.01)


@pytest.mark.slow
def test_a_body_that_nobody_reads_holds_no_connection(impatient: Live) -> None:
    """Let the body drip on after the answer, which comes early. uvicorn's own timer stops at every byte of the body."""
    with closing(socket.create_connection(("127.0.0.1", impatient.port), timeout=LIMIT_S)) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 404 ")
        with pytest.raises(ConnectionError):
            drip(connection)


@pytest.mark.slow
def test_an_answer_may_take_longer_than_a_connection_may_be_silent(impatient: Live) -> None:
    with impatient.client.stream("POST", "/generate", json={"prompt": "a", "max_tokens": 3000, "stream": True}) as reply:
        assert [name for name, _ in events(reply.iter_lines())][-1] == "done"


def test_a_head_without_end_is_431(impatient: Live) -> None:
    with closing(socket.create_connection(("127.0.0.1", impatient.port), timeout=LIMIT_S)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nLong: " + b"x" * (4 * MAX_HELD_BYTES))
        assert heard_to_the_end(connection).startswith(b"HTTP/1.1 431 ")


def test_a_head_without_end_does_not_hold_its_connection(impatient: Live) -> None:
    with closing(socket.create_connection(("127.0.0.1", impatient.port), timeout=LIMIT_S)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nLong: ")
        with pytest.raises(ConnectionError):
            drip(connection, b"x" * 4096)


def test_a_head_that_is_long_but_ends_is_read(impatient: Live) -> None:
    headers = {f"x-long-{i}": "y" * 4000 for i in range(10)}
    for _ in range(5):  # the bytes of one request do not count for the next
        assert impatient.client.get("/health", headers=headers).status_code == 200


class FakeConnection:
    """A fake connection, optionally with unread bytes of its client."""

    def __init__(self, clock: list[float], *, has_sent: bool = False) -> None:
        self._client, self._own = socket.socketpair()
        self.cycle: SimpleNamespace | None = None
        self.transport = SimpleNamespace(get_extra_info=lambda _: self._own)
        self.closed_at: float | None = None
        self._clock = clock
        if has_sent:
            self._client.send(b"GET")

    def shutdown(self) -> None:
        if self.closed_at is None:
            self.closed_at = self._clock[0]
        self._client.close()
        self._own.close()


def test_silence_begins_anew_with_every_request() -> None:
    clock = [0.0]
    busy, silent, between = (FakeConnection(clock) for _ in range(3))
    coming = FakeConnection(clock, has_sent=True)
    server = SimpleNamespace(server_state=SimpleNamespace(connections={busy, silent, between, coming}))
    waiting = IdleConnections(cast(uvicorn.Server, server), lambda: clock[0])
    busy.cycle = SimpleNamespace(response_complete=False)
    for second in range(12):
        clock[0] = second
        if second == 6:
            between.cycle = SimpleNamespace(response_complete=True)
        waiting.scan()
        waiting.close(8)
    assert (busy.closed_at, silent.closed_at, coming.closed_at, between.closed_at) == (None, 8, 9, None)
    for each in (busy, between):
        each.shutdown()
