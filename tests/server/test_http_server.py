"""The server's shutdown: no request is lost, and no client waits for ever."""

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from fastapi import FastAPI

from server.http_server import DrainingServer, http_config
from server.service.service import Service
from server.settings import Settings
from server.transport.sockets import refuse_connections
from tests.server.forked import start_forked
from tests.server.live import LIMIT_S, Live, events, wait_until

NUM_CLIENTS = 24
FOR_EVER = {"prompt": "a", "max_tokens": 4000, "stream": True}


@pytest.fixture
def flags(writer_model: Path) -> list[str]:
    return ["--model", str(writer_model), "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.01"]


def message(*, is_stream: bool, keeps: bool, max_tokens: int = 6) -> bytes:
    body = json.dumps({"prompt": "a", "max_tokens": max_tokens, "stream": is_stream}).encode()
    connection = "keep-alive" if keeps else "close"
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: {connection}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Steady:
    """A client that repeats a request, on one connection as long as it is open, until new connections are refused.

    By RFC 9112, section 9.5, an idle connection may be closed just as a request is sent on it. If no byte of an answer came, the
    client sends the request again on a new connection. Any other end of a connection counts as a lost request.
    """

    def __init__(self, number: int) -> None:
        self._is_stream, self._keeps = bool(number % 2), number % 3 != 0
        self.outcomes: Counter[str] = Counter()

    async def run(self, port: int) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                self.outcomes["refused"] += 1
                return
            try:
                await self._ask_on(reader, writer)
            finally:
                writer.close()

    async def _ask_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        num_answers = 0
        while True:
            head = body = b""
            try:
                writer.write(message(is_stream=self._is_stream, keeps=self._keeps))
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                body = await self._body(reader, head.lower())
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                partial = error.partial if isinstance(error, asyncio.IncompleteReadError) else b""
                may_repeat = num_answers and not head and not partial
                loss = f"lost after {num_answers}: {head + partial!r} {error!r}"
                self.outcomes["closed while idle" if may_repeat else loss] += 1
                return
            num_answers += 1
            is_sound = head.startswith(b"HTTP/1.1 200 ") and (b"event: done" in body or b'"finish_reason":"length"' in body)
            self.outcomes["answered" if is_sound else f"wrong: {head + body!r}"] += 1
            if b"connection: close" in head.lower():
                self.outcomes["told to close"] += self._keeps
                return

    async def _body(self, reader: asyncio.StreamReader, head: bytes) -> bytes:
        if b"transfer-encoding: chunked" in head:
            return await reader.readuntil(b"\r\n0\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return await reader.readexactly(length)


async def drain_under_load(live: Live) -> Counter[str]:
    """Send SIGTERM while many clients send requests; return the number of each outcome, with /ready's statuses for newcomers."""
    clients = [Steady(number) for number in range(NUM_CLIENTS)]
    total: Counter[str] = Counter()

    async def newcomers() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=LIMIT_S) as client:
            while True:
                try:
                    reply = await client.get("/ready", headers={"Connection": "close"})
                except httpx.ConnectError:
                    return
                total[f"ready {reply.status_code}"] += 1

    async def terminate() -> None:
        while sum(client.outcomes["answered"] for client in clients) < 5 * NUM_CLIENTS:
            await asyncio.sleep(0.01)
        live.process.send_signal(signal.SIGTERM)

    await asyncio.wait_for(asyncio.gather(*(each.run(live.port) for each in clients), newcomers(), terminate()), LIMIT_S)
    for client in clients:
        total += client.outcomes
    return total


@pytest.mark.slow
def test_sigterm_under_load_loses_no_request(flags: list[str], tmp_path: Path) -> None:
    with start_forked(tmp_path / "log", *flags, "--max-batch", "16", "--drain-notice-s", "1") as live:
        outcomes = asyncio.run(drain_under_load(live))
        assert live.process.wait(LIMIT_S) == 0
        assert "Traceback" not in live.log.read_text()
    assert outcomes.keys() <= {"answered", "told to close", "refused", "closed while idle", "ready 200", "ready 503"}, outcomes
    assert outcomes["refused"] == NUM_CLIENTS
    assert outcomes["answered"] >= 5 * NUM_CLIENTS
    assert outcomes["told to close"] > 0, "kept connections are told to close"
    assert outcomes["ready 503"] > 0, "newcomers get a 503 while connections are still accepted"


@pytest.mark.slow
def test_while_it_drains_the_server_is_not_ready_but_answers(flags: list[str], tmp_path: Path) -> None:
    with start_forked(tmp_path / "log", *flags, "--drain-notice-s", "3600") as live:
        assert live.client.get("/ready").status_code == 200
        live.process.send_signal(signal.SIGTERM)
        wait_until(lambda: live.client.get("/ready").status_code == 503, "the notice")
        with httpx.Client(base_url=live.url, timeout=LIMIT_S) as newcomer:
            reply = newcomer.post("/generate", json={"prompt": "a", "max_tokens": 3})
            assert (reply.status_code, reply.headers["connection"]) == (200, "close")
            assert newcomer.get("/health").status_code == 200
            error = newcomer.get("/ready").json()["error"]
            assert (error["message"], error["type"]) == ("the server is about to end", "ServiceUnavailableError")
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(LIMIT_S) == 1, "a second signal ends the server at once, an hour early"


@pytest.mark.slow
def test_a_request_that_outlasts_the_drain_gets_an_error(flags: list[str], tmp_path: Path) -> None:
    with start_forked(tmp_path / "log", *flags, "--drain-notice-s", "0", "--drain-s", "0.2") as live:
        with live.client.stream("POST", "/generate", json=FOR_EVER) as reply:
            heard = events(reply.iter_lines())
            next(heard)
            live.process.send_signal(signal.SIGTERM)
            *_, (last, data) = heard
        assert last == "error"
        assert data["error"]["message"] == "the server is stopping"
        assert data["error"]["code"] == 503
        assert live.process.wait(LIMIT_S) == 0
        assert "Traceback" not in live.log.read_text()


@pytest.mark.slow
def test_a_second_signal_ends_a_drain_at_once(flags: list[str], tmp_path: Path) -> None:
    with start_forked(tmp_path / "log", *flags, "--drain-notice-s", "0", "--drain-s", "3600") as live:
        with live.client.stream("POST", "/generate", json=FOR_EVER) as reply:
            next(reply.iter_lines())
            live.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "no connection is taken any more" in live.log.read_text(), "the drain")
            live.process.send_signal(signal.SIGINT)
            assert live.process.wait(LIMIT_S) == 1
        assert "ended at once by a second signal" in live.log.read_text()


@pytest.mark.slow
def test_a_person_s_interrupt_has_no_notice(flags: list[str], tmp_path: Path) -> None:
    with start_forked(tmp_path / "log", *flags, "--drain-notice-s", "3600") as live:
        with live.client.stream("POST", "/generate", json={"prompt": "a", "max_tokens": 300, "stream": True}) as reply:
            heard = events(reply.iter_lines())
            next(heard)
            live.process.send_signal(signal.SIGINT)
            assert [name for name, _ in heard][-1] == "done"
        assert live.process.wait(LIMIT_S) == 0


@pytest.mark.slow
def test_a_connection_made_before_the_end_is_answered(flags: list[str], tmp_path: Path) -> None:
    """Send the request only when new connections are no longer accepted. A connection that sends nothing is closed."""
    with (
        start_forked(tmp_path / "log", *flags, "--drain-notice-s", "0") as live,
        socket.create_connection(("127.0.0.1", live.port), timeout=LIMIT_S) as silent,
        socket.create_connection(("127.0.0.1", live.port), timeout=LIMIT_S) as late,
    ):
        live.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "no connection is taken any more" in live.log.read_text(), "the drain")
        late.sendall(message(is_stream=False, keeps=True))
        heard = b"".join(iter(lambda: late.recv(4096), b""))
        assert heard.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in heard
        assert silent.recv(1) == b""
        assert live.process.wait(LIMIT_S) == 0


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6])
def listening(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    try:
        made = socket.create_server(("", 0), family=request.param)
    except OSError:
        pytest.skip("this machine has no such addresses")
    with made:
        yield made


@pytest.mark.skipif(not hasattr(socket, "SO_INCOMING_CPU"), reason="only Linux has filters of sockets")
def test_an_early_connection_is_accepted_after_new_ones_are_refused(listening: socket.socket) -> None:
    address = ("::1" if listening.family == socket.AF_INET6 else "127.0.0.1", listening.getsockname()[1])
    with socket.create_connection(address, timeout=LIMIT_S) as early:
        early.sendall(b"ask")
        refuse_connections(listening)
        with pytest.raises(TimeoutError):
            socket.create_connection(address, timeout=0.3)
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.recv(3) == b"ask"
            accepted.sendall(b"told")
            assert early.recv(4) == b"told"
        listening.close()
        started = time.monotonic()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=LIMIT_S)
        assert time.monotonic() - started < LIMIT_S


async def listening_server(**settings: float) -> DrainingServer:
    """Return a server that listens on a free port, and answers 404."""
    engine = SimpleNamespace(has_died=False)
    service = SimpleNamespace(settings=Settings(port=0, **settings), is_draining=False, engine=engine, outline="nothing")
    config = http_config(FastAPI(), service.settings)
    server = DrainingServer(config, cast(Service, service))
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    return server


@pytest.mark.slow
def test_connections_that_are_not_accepted_yet_are_answered() -> None:
    """Open all connections while the event loop is blocked, and begin the shutdown before it can accept them."""

    async def answers(count: int) -> list[bytes]:
        server = await listening_server(drain_notice_s=0)
        address = server.servers[0].sockets[0].getsockname()
        with contextlib.ExitStack() as opened:
            made = [opened.enter_context(socket.create_connection(address, timeout=LIMIT_S)) for _ in range(count)]
            for each in made:
                each.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await server.shutdown()
            return [each.recv(12) for each in made]

    assert asyncio.run(answers(100)) == [b"HTTP/1.1 404"] * 100


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no TCP_USER_TIMEOUT")
def test_the_system_ends_connections_whose_client_reads_nothing() -> None:
    async def options() -> list[int]:
        server = await listening_server(max_unread_s=2.5, drain_notice_s=0)
        sockets = [listener for each in server.servers for listener in each.sockets]
        timeouts = [listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) for listener in sockets]
        await server.shutdown()
        return timeouts

    assert asyncio.run(options()) == [2500]
