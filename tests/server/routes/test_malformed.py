"""Ten thousand malformed bodies and a thousand malformed requests: all are refused, while another client is answered."""

import http.client
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.server.forked import start_forked
from tests.server.keyed import ADMIN, bearer, write_keys
from tests.server.live import LIMIT_S, Live, wait_until
from tests.server.malformed import UPGRADE, Maker, Raw, raw, raw_kinds

NUM_BODIES, NUM_RAW, NUM_THREADS = 10_000, 1_000, 4
MAX_BODY_BYTES = 2**20
SLACK_BYTES = 128 * 2**20
"""The most that the server's memory may grow from the first tenth of the bodies to the last. A leak would be gigabytes."""
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")

KEY = f"Authorization: {bearer(ADMIN)['Authorization']}\r\n".encode()


@pytest.fixture(scope="module")
def attacked(writer_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Yield a server with as many places as there are clients, so that a place that is not freed would be missed."""
    place = tmp_path_factory.mktemp("attacked")
    flags = ["--model", str(writer_model), "--adapters", str(adapters), "--dtype", "float32", "--threads", "1"]
    flags += ["--kv-cache-gib", "0.004", "--max-requests", str(NUM_THREADS + 1), "--keys", str(write_keys(place))]
    with start_forked(place / "log", *flags) as server:
        server.client.headers.update(bearer(ADMIN))
        yield server


@dataclass(slots=True)
class Healthy:
    """A client that repeats a request, and must always get the same answer."""

    live: Live
    num_answers: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        body = {"prompt": "Tell me", "adapter": "math", "max_tokens": 4}
        text = self.live.generate(**body)["text"]
        while not self.is_over.is_set():
            assert self.live.generate(**body)["text"] == text
            self.num_answers += 1


def send_bodies(live: Live, seed: int, count: int, statuses: Counter[int]) -> None:
    """Send malformed bodies one after the other. Fail unless each is refused in the shape of errors."""
    maker, connection = Maker(seed, MAX_BODY_BYTES), http.client.HTTPConnection("127.0.0.1", live.port, timeout=LIMIT_S)
    with closing(connection):
        for _ in range(count):
            sent = maker.body()
            connection.request(sent.method, sent.path, sent.content, {**sent.headers, **bearer(ADMIN)})
            reply = connection.getresponse()
            body = reply.read()
            assert 400 <= reply.status < 500, (sent.path, sent.headers, sent.content[:2000], reply.status, body[:500])
            error = json.loads(body)["error"]
            assert error["code"] == reply.status
            assert error["message"]
            assert len(body) < 4000, (sent.content[:200], body)
            statuses[reply.status] += 1


def send_raw(live: Live, seed: int, count: int, statuses: Counter[int]) -> None:
    """Send raw bytes, each on a connection of its own, and check the answers."""
    random, key = Random(seed), f"Authorization: {bearer(ADMIN)['Authorization']}\r\n"
    for _ in range(count):
        check_raw(live, raw(random, key), statuses)


def check_raw(live: Live, sent: Raw, statuses: Counter[int]) -> None:
    """Send `sent` and check its answers. The client ends its side at once if `sent` is cut, otherwise after all answers."""
    heard, is_closed = b"", False
    with closing(socket.create_connection(("127.0.0.1", live.port), LIMIT_S)) as connection:
        with suppress(ConnectionError) if sent.is_cut else nullcontext():  # the server may close before everything is sent
            connection.sendall(sent.content)
        while not is_closed and not sent.is_cut and (sent.closes or len(STATUS.findall(heard)) < len(sent.answers)):
            heard += (chunk := connection.recv(65536))
            is_closed = not chunk
        if not sent.is_cut and not is_closed:
            assert live.client.get("/health").status_code == 200  # gives an answer too many the time to arrive
        with suppress(ConnectionError):  # the client has left, and the server may reset the connection
            if not is_closed:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                heard += chunk
    answered = [int(status) for status in STATUS.findall(heard)]
    fault = sent.check(answered, is_closed)
    assert fault is None, (fault, sent.content[:2000], heard[:2000])
    statuses.update(answered)


def test_a_web_socket_request_is_answered_as_any_other(attacked: Live) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    reply = attacked.client.get("/generate", headers=headers | {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="})
    assert reply.status_code == 405
    assert reply.json()["error"]["code"] == 405


def statuses_of(live: Live, head: bytes, body: bytes, *, is_one_segment: bool) -> list[int]:
    """Send a request, then another for an unknown route, and return the statuses of all answers but `100 Continue`.

    Unless `is_one_segment`, the body is sent only when the server asks for it, so it cannot arrive together with the head.
    """
    heard = b""
    with closing(socket.create_connection(("127.0.0.1", live.port), LIMIT_S)) as connection:
        if is_one_segment:
            connection.sendall(head + b"\r\n" + body)
        else:
            connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
            while b"HTTP/1.1 100 " not in heard:
                heard += (chunk := connection.recv(4096))
                assert chunk, heard
            connection.sendall(body)
        while {*STATUS.findall(heard)} <= {b"100"}:
            heard += (chunk := connection.recv(4096))
            assert chunk, heard
        with suppress(ConnectionError):  # the server may close after the first answer
            connection.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%b\r\n" % KEY)
            while chunk := connection.recv(4096):
                heard += chunk
    return [int(status) for status in STATUS.findall(heard) if status != b"100"]


@pytest.mark.parametrize("is_one_segment", [True, False])
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(
    "offer",
    [
        pytest.param(UPGRADE, id="websocket"),
        pytest.param(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n", id="h2c"),
        pytest.param(b"Connection: keep-alive, upgrade\r\nUpgrade: x\r\n", id="unknown"),
    ],
)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b'{"prompt": "x", "max_tokens": 2}', 200, id="sound"),
        pytest.param(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n", 400, id="a request"),
    ],
)
def test_the_body_behind_an_offer_of_another_protocol_is_read_and_answered_once(
    attacked: Live, offer: bytes, body: bytes, status: int, is_chunked: bool, is_one_segment: bool
) -> None:
    """Check RFC 9110, section 7.8: the offer is ignored, the request is answered as any other, and its body is no request."""
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + KEY + offer
    framing = b"Transfer-Encoding: chunked\r\n" if is_chunked else b"Content-Length: %d\r\n" % len(body)
    content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body
    answers = statuses_of(attacked, head + framing, content, is_one_segment=is_one_segment)
    assert answers in ([status], [status, 404])


def test_every_kind_of_raw_bytes_is_answered_as_it_must_be(attacked: Live) -> None:
    statuses = Counter[int]()
    for sent in raw_kinds(Random(1), f"Authorization: {bearer(ADMIN)['Authorization']}\r\n"):
        check_raw(attacked, sent, statuses)
        check_raw(attacked, replace(sent, content=sent.content[:-1], is_cut=True), statuses)
    assert statuses.total() > 60


@pytest.mark.slow
def test_malformed_requests_are_refused_while_others_are_answered(attacked: Live) -> None:
    healthy, statuses, server = Healthy(attacked), Counter[int](), psutil.Process(attacked.process.pid)
    raw_statuses = Counter[int]()
    shares = [(send_bodies, NUM_BODIES // NUM_THREADS // 10, statuses), (send_raw, NUM_RAW // NUM_THREADS // 10, raw_statuses)]
    num_bytes = 0
    with ThreadPoolExecutor(NUM_THREADS + 1) as pool:
        asking = pool.submit(healthy.run)
        try:
            for tenth in range(10):
                before = healthy.num_answers
                for send, count, counter in shares:
                    seeds = range(tenth * NUM_THREADS, (tenth + 1) * NUM_THREADS)
                    for sending in [pool.submit(send, attacked, seed, count, counter) for seed in seeds]:
                        sending.result()
                assert not asking.done(), asking.result()
                assert healthy.num_answers > before, "the healthy client was answered meanwhile"
                num_bytes = num_bytes or server.memory_info().rss
        finally:
            healthy.is_over.set()
        asking.result()
    assert statuses.total() == NUM_BODIES
    assert 429 not in statuses, "every place was freed"
    assert raw_statuses.keys() >= {100, 200, 400, 404, 405, 431}
    assert server.memory_info().rss < num_bytes + SLACK_BYTES
    attacked.wait_for(running=0, waiting=0)
    wait_until(lambda: attacked.metric("lori:requests_under_way") == 0, "all places to be freed")
    assert attacked.client.get("/ready").status_code == 200
    assert "Traceback" not in attacked.log.read_text()
