"""Valid and invalid ways to frame a request. Each must be answered once, and never as two requests."""

import http.client
import io
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing, suppress
from dataclasses import dataclass

from tests.server.live import LIMIT_S

ECHO = "unique echo"
BODY = b'{"prompt": "unique echo", "return_token_strs": true, "add_special_tokens": false}'
"""The body of POST /tokenize, whose answer contains the prompt."""
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
SENTINEL = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
UNKNOWN = (401, 404)
"""Statuses of the answer to `SMUGGLED`."""
PAUSE_S = 0.02
"""A pause that lets the server read the first segment alone. On a machine too busy for that the test gets easier, not wrong."""
WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
"""Headers as Java's HttpClient and `curl --http2` send them."""

OFFERS = {"h2c": H2C, "websocket": WEBSOCKET, "any": b"Connection: keep-alive, upgrade\r\nUpgrade: x\r\n"}


@dataclass(frozen=True, slots=True)
class Case:
    """A request as bytes, and the statuses that may answer it."""

    name: str
    content: bytes
    statuses: frozenset[int]
    rest: bytes = b""
    """Another request behind the first. A server that refuses the first must not read it."""
    is_echoed: bool = False
    """Whether the body must have been read: the answer contains `ECHO`."""
    may_close: bool = False
    """Whether the connection may be closed without an answer."""
    is_kept: bool = False
    """Whether the connection takes another request afterwards."""
    is_repairable: bool = False
    """Whether a proxy may repair the request and pass it on (RFC 9112: a bare LF, folded lines, one length twice)."""

    def __str__(self) -> str:
        return self.name


def head(*headers: bytes, line: bytes = b"POST /tokenize HTTP/1.1", host: bytes = b"Host: localhost\r\n") -> bytes:
    return line + b"\r\n" + host + b"Content-Type: application/json\r\n" + b"".join(headers)


def sized(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    parts = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"Transfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n" + trailer + b"\r\n"


def _ok(name: str, content: bytes, rest: bytes = b"", *, is_kept: bool = True) -> Case:
    return Case(name, content, frozenset({200}), rest, is_echoed=True, is_kept=is_kept)


def _refused(name: str, content: bytes, *statuses: int, is_repairable: bool = False) -> Case:
    return Case(name, content, frozenset(statuses or {400}), SMUGGLED, may_close=True, is_repairable=is_repairable)


def _upgrades() -> Iterator[Case]:
    for protocol, offer in OFFERS.items():
        name, start = f"upgrade to {protocol}, ", head(offer)
        yield _ok(f"{name}sized", start + sized(BODY), is_kept=False)
        yield _ok(f"{name}chunked", start + chunked(BODY[:9], BODY[9:]), is_kept=False)
        yield _ok(f"{name}another request behind", start + sized(BODY), SMUGGLED, is_kept=False)
        yield Case(f"{name}a request as body", start + sized(SMUGGLED), frozenset({400}))
        yield Case(f"{name}a request in a chunk", start + chunked(SMUGGLED), frozenset({400}))
        yield Case(f"{name}no body", head(offer, line=b"GET /health HTTP/1.1") + b"\r\n", frozenset({200}))
        yield _refused(f"{name}a chunk of no size", start + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        yield _refused(f"{name}two lengths", head(offer, b"Content-Length: 3\r\n") + sized(SMUGGLED))
    connect = b"CONNECT localhost:80 HTTP/1.1"
    yield _refused("CONNECT", head(line=connect) + b"\r\n", 405)
    yield _refused("CONNECT, sized", head(line=connect) + sized(SMUGGLED), 405)
    yield _refused("CONNECT and an upgrade", head(H2C, line=connect) + sized(SMUGGLED), 405)


def _lengths() -> Iterator[Case]:
    n = len(BODY)
    for name, value in {
        "two lengths": b"%d\r\nContent-Length: 3" % n,
        "a list of lengths": b"%d, 3" % n,
        "a length with a sign": b"+%d" % n,
        "a negative length": b"-1",
        "a hexadecimal length": b"0x10",
        "a length with an underscore": b"1_0",
        "an empty length": b"",
        "a length of thirty digits": b"9" * 30,
    }.items():
        yield _refused(name, head(b"Content-Length: " + value + b"\r\n\r\n") + BODY)
    twice = b"Content-Length: %d\r\n" % n
    yield _refused("one length twice", head(twice) + sized(BODY), is_repairable=True)
    yield _refused("length and chunks", head(twice) + chunked(BODY), is_repairable=True)
    start = head(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n")
    yield _refused("chunks and length", start + b"0\r\n\r\n", is_repairable=True)
    for value in (
        b"chunked, gzip",
        b"gzip, chunked",
        b"identity",
        b"xchunked",
        b'"chunked"',
        b"chunked;q=1",
        b"chunked, chunked",
    ):
        start = head(b"Transfer-Encoding: " + value + b"\r\n\r\n")
        yield _refused(f"the coding {value.decode()}", start + b"0\r\n\r\n", 400, 422, 501)
    yield _refused("two codings", head(b"Transfer-Encoding: chunked\r\n") + chunked(BODY))
    yield _refused("a coding in HTTP/1.0", head(line=b"POST /tokenize HTTP/1.0") + chunked(BODY), is_repairable=True)


def _chunks() -> Iterator[Case]:
    n, start = b"%x" % len(BODY), head(b"Transfer-Encoding: chunked\r\n\r\n")
    end = b"\r\n0\r\n\r\n"
    for name, rest in {
        "a chunk size with a sign": b"+" + n + b"\r\n" + BODY + end,
        "a negative chunk size": b"-1\r\n" + BODY + end,
        "a chunk size with 0x": b"0x" + n + b"\r\n" + BODY + end,
        "a chunk size with a space before": b" " + n + b"\r\n" + BODY + end,
        "a chunk size of seventeen digits": b"F" * 17 + b"\r\n" + BODY + end,
        "no chunk size": b"\r\n" + BODY + end,
        "a chunk that does not end": n + b"\r\n" + BODY + b"xx0\r\n\r\n",
        "a chunk longer than its size": b"3\r\n" + BODY + end,
        "a trailer that is no header": n + b"\r\n" + BODY + b"\r\n0\r\nno colon\r\n\r\n",
    }.items():
        yield _refused(name, start + rest)
    for name, rest in {
        "a chunk size that ends in LF": n + b"\n" + BODY + end,
        "a chunk that ends in LF": n + b"\r\n" + BODY + b"\n0\r\n\r\n",
        "a chunk extension with a bare CR": n + b";a\rb\r\n" + BODY + end,
        "a chunk extension that ends in LF": n + b";a\n" + BODY + end,
    }.items():
        yield _refused(name, start + rest, is_repairable=True)
    long = b"X: " + b"a" * 200_000 + b"\r\n"
    yield _refused("a trailer of 200 kB", head() + chunked(BODY, trailer=long), 400, 413, 431)


def _heads() -> Iterator[Case]:
    n, length = sized(BODY), b"%d" % len(BODY)
    for name, content in {
        "a bare CR in a header": head(b"X: a\rb\r\n") + n,
        "NUL in a header": head(b"X: a\0b\r\n") + n,
        "a space before the colon": head(b"Content-Length : 3\r\n\r\n") + BODY,
        "a header without a colon": head(b"No colon\r\n") + n,
        "a header without a name": head(b": x\r\n") + n,
        "no Host": head(host=b"") + n,
        "two Hosts": head(host=b"Host: localhost\r\nHost: other\r\n") + n,
        "a Host with a path": head(host=b"Host: localhost/x\r\n") + n,
        "a Host with user information": head(host=b"Host: me@localhost\r\n") + n,
        "an absolute target with user information": head(line=b"POST http://me@localhost/tokenize HTTP/1.1") + n,
        "an absolute target of another scheme": head(line=b"POST ftp://localhost/tokenize HTTP/1.1") + n,
        "a target with a space": head(line=b"POST /tok enize HTTP/1.1") + n,
    }.items():
        yield _refused(name, content)
    for name, content in {
        "a bare LF after the request line": b"POST /tokenize HTTP/1.1\n" + head(line=b"X: a") + n,
        "a bare LF after a header": head(b"X: a\n") + n,
        "a bare LF after the headers": head(b"Content-Length: " + length + b"\r\n\n") + BODY,
        "a folded header": head(b"X: a\r\n b\r\n") + n,
        "a folded length": head(b"Content-Length:\r\n " + length + b"\r\n\r\n") + BODY,
        "a folded coding": head(b"Transfer-Encoding:\r\n\tchunked\r\n\r\n") + b"0\r\n\r\n",
        "the same Host twice": head(host=b"Host: localhost\r\nHost: localhost\r\n") + n,
    }.items():
        yield _refused(name, content, is_repairable=True)
    for version in (b"0.9", b"1.2", b"2.0", b"9.9"):
        name = f"HTTP/{version.decode()}"
        yield _refused(name, head(line=b"POST /tokenize HTTP/" + version) + n, 400, 426, 505, is_repairable=True)
    yield _refused("a request line without a version", b"GET /health\r\n\r\n", 400, 505)
    yield _refused("headers of 200 kB", head(b"X: " + b"a" * 200_000 + b"\r\n") + n, 400, 431)
    yield _refused("a target of 200 kB", head(line=b"GET /" + b"a" * 200_000 + b" HTTP/1.1") + b"\r\n", 400, 414, 431)


def _legal() -> Iterator[Case]:
    body, start = sized(BODY), head(b"Transfer-Encoding: chunked\r\n\r\n")
    absolute = b"POST http://localhost/tokenize HTTP/1.1"
    yield _ok("sized", head() + body)
    yield _ok("chunked", head() + chunked(BODY[:10], BODY[10:]))
    yield _ok("chunk extensions", start + b'%x;a=b;c="d"\r\n%b\r\n0\r\n\r\n' % (len(BODY), BODY))
    yield _ok("a chunk size with leading zeros", start + b"000%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
    yield _ok("a trailer", head() + chunked(BODY, trailer=b"X-Checksum: 5\r\n"))
    yield _ok("absolute form", head(line=absolute) + body)
    yield _ok("HTTP/1.0 without Host", head(line=b"POST /tokenize HTTP/1.0", host=b"") + body, is_kept=False)
    yield _ok("empty lines before", b"\r\n\r\n" + head() + body)
    yield _ok("Upgrade alone", head(b"Upgrade: h2c\r\n") + body)
    yield _ok("Connection alone", head(b"Connection: upgrade\r\n") + body)


CASES: Sequence[Case] = [*_upgrades(), *_lengths(), *_chunks(), *_heads(), *_legal()]


def _whole(connection: socket.socket, content: bytes) -> None:
    connection.sendall(content)


def _cut(connection: socket.socket, content: bytes) -> None:
    headers, end, body = content.lstrip(b"\r\n").partition(b"\r\n\r\n")
    connection.sendall(content[: len(content) - len(body)] if end else headers)
    time.sleep(PAUSE_S)
    connection.sendall(body)


def _bytewise(connection: socket.socket, content: bytes) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for place in range(len(content[:2000])):
        connection.sendall(content[place : place + 1])
    connection.sendall(content[2000:])


WAYS: dict[str, Callable[[socket.socket, bytes], None]] = {"whole": _whole, "cut": _cut, "bytewise": _bytewise}


@dataclass(frozen=True, slots=True)
class Exchange:
    """A server's answers to a request and, if the connection was still open, to `SENTINEL` after it."""

    answers: Sequence[tuple[int, bytes]]
    is_kept: bool
    """Whether the connection took a further request."""


def ask(port: int, case: Case, way: str, key: bytes = b"", limit_s: float = LIMIT_S) -> Exchange:
    """Return the answers of the server at `port` to a request, sent with `key`. A request taken for two has an answer too many.

    Raises `TimeoutError` if the server sends nothing for `limit_s`.
    """
    content = case.content + case.rest
    if key:
        line, end, rest = content.lstrip(b"\r\n").partition(b"\n")
        content = line + end + b"Authorization: Bearer " + key + b"\r\n" + rest
    with closing(socket.create_connection(("127.0.0.1", port), limit_s)) as connection:
        received = b""
        with suppress(ConnectionError):  # the server may close while we still send, after its answer
            WAYS[way](connection, content)
        received = _received(connection, received, until_answer=True)
        with suppress(ConnectionError):
            connection.sendall(SENTINEL)
        answers = parsed(_received(connection, received))
    is_kept = len(answers) > 1 and answers[-1] == (200, b'{"status":"ok"}')
    return Exchange(answers[:-1] if is_kept else answers, is_kept)


def _received(connection: socket.socket, received: bytes, *, until_answer: bool = False) -> bytes:
    # Reads until the server closes or, with `until_answer`, one answer is complete.
    with suppress(ConnectionError):
        while not (until_answer and parsed(received)) and (chunk := connection.recv(65536)):
            received += chunk
    return received


class _Stream(io.BytesIO):
    # The stream that http.client reads one answer after the other from. http.client closes it after each, which is ignored.
    def makefile(self, *_: object, **__: object) -> "_Stream":
        return self

    def close(self) -> None:
        pass


def parsed(received: bytes) -> list[tuple[int, bytes]]:
    """Return the status and the body of each complete answer."""
    stream, answers = _Stream(received), []
    while stream.tell() < len(received):
        reply = http.client.HTTPResponse(stream)  # type: ignore[arg-type]  # HTTPResponse needs only makefile
        try:
            reply.begin()
            body = reply.read()
        except http.client.HTTPException:  # the answer is not complete
            break
        answers.append((reply.status, body))
    return answers


def check(case: Case, exchange: Exchange) -> None:
    """Fail unless the server answered once, or closed the connection if the case allows it."""
    assert len(exchange.answers) <= 1, (case.name, exchange)
    if not exchange.answers:
        assert case.may_close, (case.name, exchange)
        return
    _check_answer(case, exchange, case.statuses, is_echoed=case.is_echoed)
    assert exchange.is_kept is case.is_kept, (case.name, exchange)


def check_proxied(case: Case, exchange: Exchange) -> None:
    """Fail unless a proxy answered each request once.

    A proxy may repair requests as RFC 9112 allows. It may keep the connection of a refused request whose end it knows: the
    bytes that follow are then another request.
    """
    if not exchange.answers:
        assert case.may_close, case.name
        return
    status = exchange.answers[0][0]
    repaired = {200, 400} if case.is_repairable else set()
    _check_answer(case, exchange, case.statuses | repaired, is_echoed=status == 200 and b"/health" not in case.content)
    others = exchange.answers[1:]
    assert len(others) <= bool(case.rest and status != 405), (case.name, exchange)
    assert all(status in UNKNOWN for status, _ in others), (case.name, exchange)


def _check_answer(case: Case, exchange: Exchange, statuses: Set[int], *, is_echoed: bool) -> None:
    status, body = exchange.answers[0]
    assert status in statuses, (case.name, exchange)
    assert not is_echoed or ECHO in "".join(json.loads(body)["token_strs"]).replace("Ġ", " "), (case.name, exchange)
