"""Invalid HTTP, and clients that pipeline many requests or leave, over a real socket."""

import json
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from server.transport.http_protocol import MAX_HEADERS, MAX_LINGER_BYTES, MAX_PIPELINED
from tests.server.live import LIMIT_S, Live, wait_until
from tests.server.replies import FOR_EVER
from tests.server.transport.test_slow_clients import HEAD, heard_to_the_end

CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
ANSWERS = "lori:http_requests_total"


def connected(live: Live) -> closing[socket.socket]:
    return closing(socket.create_connection(("127.0.0.1", live.port), LIMIT_S))


def asked(**body: object) -> bytes:
    content = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content


def check_refusal(heard: bytes, message: str) -> None:
    head, _, body = heard.partition(b"\r\n\r\n")
    status, *headers = head.split(b"\r\n")
    assert status == b"HTTP/1.1 400 Bad Request"
    assert {b"content-type: application/json", b"connection: close", b"content-length: %d" % len(body)} <= set(headers)
    assert json.loads(body) == {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"rubbish\r\n\r\n", id="no head"),
        pytest.param(b"GET /health HTTP/1.1\r\nNo colon\r\n\r\n", id="a header without a colon"),
        pytest.param(CHUNKED + b"zz\r\n", id="a chunk of no length"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 15\r\n\r\n", id="two lengths"),
    ],
)
def test_invalid_http_is_refused_in_the_shape_of_errors(live: Live, sent: bytes) -> None:
    with connected(live) as connection:
        connection.sendall(sent)
        check_refusal(heard_to_the_end(connection), "the request is no HTTP that can be read")


@pytest.mark.parametrize("framing", [b"1;a=", b'1\r\n{\r\n0\r\nlong: "'], ids=["extension", "trailer"])
def test_endless_chunk_extensions_and_trailers_are_400(live: Live, framing: bytes) -> None:
    """Regression: a client that kept sending was reset before it got the refusal."""
    with connected(live) as connection:
        connection.sendall(CHUNKED + framing + b"x" * (MAX_LINGER_BYTES // 2))
        check_refusal(heard_to_the_end(connection), "a chunk's extensions or the trailer are longer than 65536 bytes")


def test_a_refused_client_that_keeps_sending_is_cut_off(live: Live) -> None:
    with connected(live) as connection, pytest.raises(ConnectionError):  # noqa: PT012
        connection.sendall(b"rubbish\r\n\r\n")
        for _ in range(100 * MAX_LINGER_BYTES // 65536):
            connection.sendall(b"x" * 65536)


@pytest.mark.parametrize("refused", [b"rubbish\r\n\r\n", CHUNKED + b"zz\r\n"], ids=["no head", "a body"])
def test_earlier_requests_are_answered_before_a_refusal(live: Live, refused: bytes) -> None:
    """Regression: the refusal was sent at once, and clients took it for the answer to an earlier request."""
    with connected(live) as connection:
        connection.sendall(asked(prompt="x", max_tokens=200) + GET + refused)
        heard = heard_to_the_end(connection)
    assert [part[:3] for part in heard.split(b"HTTP/1.1 ")] == [b"", b"200", b"200", b"400"]
    check_refusal(heard[heard.rindex(b"HTTP/1.1 ") :], "the request is no HTTP that can be read")


def test_an_answer_to_a_body_that_breaks_off_is_not_followed_by_another(live: Live) -> None:
    with connected(live) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        heard = connection.recv(4096)
        connection.sendall(b"zz\r\n")
        heard += heard_to_the_end(connection)
    assert heard.count(b"HTTP/1.1 ") == 1
    assert heard.startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("coded", [b"gzip, chunked", b"gzip\r\nTransfer-Encoding: chunked"], ids=["one header", "two headers"])
def test_a_coding_beside_chunks_is_refused_by_the_header_s_name(live: Live, coded: bytes) -> None:
    """Regression: the body was read as if it had no coding."""
    with connected(live) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: " + coded + b'\r\n\r\nf\r\n{"prompt": "x"}\r\n0\r\n\r\n')
        check_refusal(heard_to_the_end(connection), "Transfer-Encoding is 'gzip, chunked', expected chunked or none")


def test_thousands_of_pipelined_requests_are_not_all_held(live: Live) -> None:
    """Regression: each took 3 kB until the first was answered, and a client need not read. 40 connections held 640 MB."""
    with connected(live) as connection:
        connection.sendall(asked(prompt="x", max_tokens=200) + GET * 5000)
        heard = heard_to_the_end(connection)
    statuses = [part[:3] for part in heard.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200"] * (MAX_PIPELINED + 1) + [b"429"]


@pytest.mark.parametrize(("number", "status"), [(MAX_HEADERS - 1, b"200"), (MAX_HEADERS, b"431")])
def test_the_number_of_headers_is_bounded(live: Live, number: int, status: bytes) -> None:
    """Regression: 16,000 headers of three bytes held 1.5 MB as long as their connection was idle."""
    with connected(live) as connection:
        connection.sendall(GET.removesuffix(b"\r\n") + b"a:\r\n" * (number - 1) + b"Connection: close\r\n\r\n")
        assert heard_to_the_end(connection).split(b" ")[1] == status


def leave(connection: socket.socket) -> None:
    """End a connection with a reset, as the system does if its client reads nothing."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("go", [leave, socket.socket.close], ids=["reset", "close"])
def test_the_departure_of_a_pipelining_client_is_noticed(live: Live, go: Callable[[socket.socket], None]) -> None:
    """Regression: only the last request was told of a reset, and the earlier ones ran on. A close was not noticed at all."""
    before = live.metric(ANSWERS, route="/generate", status="499")
    with connected(live) as connection:
        connection.sendall(asked(prompt="x", max_tokens=FOR_EVER) + GET)
        live.wait_for(running=1)
        go(connection)
    wait_until(lambda: live.metric(ANSWERS, route="/generate", status="499") == before + 1, "the departure")
    live.wait_for(running=0)


def test_a_client_that_reads_nothing_and_leaves_writes_no_traceback(live: Live) -> None:
    """Regression: writes to a departed client failed, since only its last request had been told of the departure."""
    before = live.log.read_text().count("Traceback")
    connections = [socket.socket() for _ in range(10)]
    for each in connections:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        each.connect(("127.0.0.1", live.port))
        each.sendall(b"GET /static/docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * MAX_PIPELINED)
    num_answers = -1.0
    while num_answers < (num_answers := live.metric(ANSWERS, route="none")):
        time.sleep(0.5)
    for each in connections:
        leave(each)
    wait_until(lambda: live.metric(ANSWERS, route="none") >= num_answers + len(connections), "the ends of the connections")
    assert live.log.read_text().count("Traceback") == before
