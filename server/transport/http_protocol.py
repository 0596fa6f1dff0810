"""uvicorn's HTTP protocol, made strict: malformed requests are refused with JSON errors, and disconnects are always noticed.

Answers come in the order of the requests, and a connection may have several under way. uvicorn tells only the last of them that
the client has left, and writes its refusals between the answers.

An offer to upgrade to another protocol is ignored, as RFC 9110, section 7.8 allows. httptools ends such a request at its headers,
whatever they say of a body, so the body would be read as the next request (request smuggling; httptools issue 124).
"""

import asyncio
import itertools
import re
from http import HTTPStatus

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.transport.connections import LINGER_S, BoundedState, raw_error

MAX_HELD_BYTES = 64 * 1024
"""Maximum number of bytes of headers that are held; uvicorn has no limit."""
MAX_LINGER_BYTES = 1024 * 1024
MAX_HEADERS = 128
"""Maximum number of headers of one request. Each costs far more memory than its minimum of three bytes."""
MAX_PIPELINED = 16
"""Requests of one connection that wait for the answer to the one before: thousands of them fit into one segment."""
VERSIONS = ("1.0", "1.1")
FRAMING = (b"content-length", b"transfer-encoding")
HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[^\s/?#@\\,:\[\]]*)(:[0-9]*)?")
"""An authority without user information: a name or an IP address, and an optional port (RFC 9110, section 7.2)."""
SCHEMES = (b"http", b"https")
ALLOWED = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
HEADERS = {
    HTTPStatus.METHOD_NOT_ALLOWED: (f"allow: {ALLOWED}",),
    HTTPStatus.TOO_MANY_REQUESTS: ("retry-after: 1",),
}
"""Further headers of refusals, by status."""
_ORDINALS = itertools.count()
UNREADABLE = "the request is no HTTP that can be read"


class HeaderError(Exception):
    """A request's headers were parsed, but are refused."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(message)


class HttpProtocol(HttpToolsProtocol):
    """HTTP/1.0 and 1.1 on one connection.

    Refuses, and closes the connection on: what cannot be parsed, a missing or ambiguous `Host`, `Transfer-Encoding` in HTTP/1.0,
    and chunk extensions or a trailer of more than about `MAX_HELD_BYTES` bytes (400); headers of that length, or more than
    `MAX_HEADERS` of them (431); `CONNECT` (405); other versions (505); a request behind `MAX_PIPELINED` others that wait (429).
    The headers of a trailer are dropped, so that they never count as the request's own. After a request that offers an upgrade
    the connection closes.
    """

    _num_held = 0
    """Bytes received since the last data that went to the application."""
    _num_field_bytes = 0
    """Bytes of the target and the headers that are being parsed, or of the trailer. They may all come in one segment."""
    _is_in_body = False
    """Whether the parser is in the body of the request of `cycle`; otherwise the next request has no cycle yet."""
    _current: RequestResponseCycle | None = None
    """The first cycle that is not answered, or the last one that was."""
    _refusal: bytes | None = None
    """The response that ends the connection; nothing is parsed after it is set."""
    _has_refused = False
    ordinal = 0
    """The number of the connection. The loop's clock is too coarse to tell which of two connections is older."""
    _header_error: HeaderError | None = None
    """The reason to refuse the headers that were just parsed."""
    _last_body: "_LastBody | None" = None
    """The body of a request that offered an upgrade. Nothing is parsed after it."""

    def data_received(self, data: bytes) -> None:
        """Feed received bytes to the parser."""
        if self._last_body and self._last_body.is_whole:
            return
        self._num_held += len(data)
        if self._refusal is not None:
            self._discard()
            return
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._num_held > MAX_HELD_BYTES and self._refusal is None and not self.transport.is_closing():
            error = self._too_long()
            self._refuse(error.status, error.message)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Set up a connection, which the server's state may refuse."""
        self.ordinal = next(_ORDINALS)
        super().connection_made(transport)
        if isinstance(self.server_state, BoundedState):
            self.server_state.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the loss of the connection."""
        super().connection_lost(exc)
        if self._current:
            _disconnect(self._current)

    def on_message_begin(self) -> None:
        """Start a request."""
        self._num_field_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Add a part of a request's target. Raises `HeaderError`."""
        self._count_field_bytes(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header, unless it is in a trailer: a trailer comes after the request was authorised and routed.

        Raises `HeaderError`.
        """
        self._count_field_bytes(len(name) + len(value))
        if self._is_in_body:
            return
        if len(self.headers) == MAX_HEADERS:
            message = f"the request has more than {MAX_HEADERS} headers"
            self._header_error = HeaderError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)
            raise self._header_error
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check a request's headers and start to answer it. Raises `HeaderError`."""
        self._num_held = self._num_field_bytes = 0
        try:
            self._check_headers()
        except HeaderError as error:
            self._header_error = error  # httptools raises another error
            raise
        super().on_headers_complete()
        self._is_in_body = True
        if self.pipeline:
            self.flow.resume_reading()  # otherwise uvicorn would not notice that the client has left
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Pass a part of the body to the application."""
        self._num_held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Handle the end of a request, unless its body is still to come: see `_ignore_upgrade`."""
        if self.parser.should_upgrade():
            return
        self._num_held = 0
        self._is_in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Handle the end of an answer."""
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._is_in_body and self.expect_100_continue:
            # The client asked whether to send its body, and may continue without it: the next bytes are ambiguous.
            self.transport.close()
        if self._refusal is not None and is_last and not self.transport.is_closing():
            self._end()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's signature
        """Refuse a request that cannot be parsed, or whose headers are refused."""
        if self._header_error:
            self._refuse(self._header_error.status, self._header_error.message)
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, UNREADABLE)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            [num_read] = offer.args
            self._ignore_upgrade(data[num_read:])
        except httptools.HttpParserError:
            if not (self._last_body and self._last_body.is_whole):
                self.send_400_response(UNREADABLE)

    def _ignore_upgrade(self, data: bytes) -> None:
        # Another parser reads the body, from headers that have this request's framing and no offer.
        self._last_body = _LastBody(self)
        self.parser = httptools.HttpRequestParser(self._last_body)
        framing = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] in FRAMING)
        self._feed(b"POST / HTTP/1.1\r\nconnection: close\r\n%b\r\n%b" % (framing, data))

    def _check_headers(self) -> None:
        version = self.parser.get_http_version()
        if version not in VERSIONS:
            expected = " or ".join(VERSIONS)
            raise HeaderError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"the HTTP version is {version}, expected {expected}")
        if self.parser.get_method() == b"CONNECT":
            raise HeaderError(HTTPStatus.METHOD_NOT_ALLOWED, f"the method is CONNECT, expected {ALLOWED}")
        if len(self.pipeline) == MAX_PIPELINED:
            message = f"{MAX_PIPELINED} requests of this connection wait for an answer, and may be no more; send this one again"
            raise HeaderError(HTTPStatus.TOO_MANY_REQUESTS, message)
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (version == "1.1" and not hosts):
            raise HeaderError(HTTPStatus.BAD_REQUEST, f"the request has {len(hosts)} Host headers, expected one")
        if hosts and not HOST.fullmatch(hosts[0]):
            raise HeaderError(HTTPStatus.BAD_REQUEST, "the Host header is no name or address with a port")
        if version == "1.0" and any(name == b"transfer-encoding" for name, _ in self.headers):
            raise HeaderError(HTTPStatus.BAD_REQUEST, "the request is HTTP/1.0 with Transfer-Encoding, which that version lacks")
        if not self.url.startswith(b"/") and self.url != b"*":
            self._take_absolute_form()

    def _take_absolute_form(self) -> None:
        # RFC 9112, section 3.2.2: the target's authority counts, not the Host header.
        url = httptools.parse_url(self.url)
        scheme, _, rest = self.url.partition(b"://")
        authority = re.split(rb"[/?]", rest, maxsplit=1)[0]
        if scheme.lower() not in SCHEMES or not authority or not HOST.fullmatch(authority):
            raise HeaderError(HTTPStatus.BAD_REQUEST, "the request's target is no path and no http address")
        self.url = (url.path or b"/") + (b"?" + url.query if url.query is not None else b"")
        self.headers[:] = [header for header in self.headers if header[0] != b"host"]
        self.headers.append((b"host", authority))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._current = cycle
        super()._start_asgi_task(cycle, app)

    def _count_field_bytes(self, num_bytes: int) -> None:
        self._num_field_bytes += num_bytes
        if self._num_field_bytes > MAX_HELD_BYTES:
            self._header_error = self._too_long()
            raise self._header_error

    def _too_long(self) -> HeaderError:
        if self._is_in_body:
            message = f"a chunk's extensions or the trailer are longer than {MAX_HELD_BYTES} bytes"
            return HeaderError(HTTPStatus.BAD_REQUEST, message)
        message = f"the request's head is longer than {MAX_HELD_BYTES} bytes"
        return HeaderError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        # Now, or when the earlier requests are answered.
        self._refusal = raw_error(status, message, *HEADERS.get(status, ()))
        refused, due = self.cycle if self._is_in_body else None, self._current
        if refused and refused is due:
            self._abort(refused)
        elif due is None or due.response_complete:
            self._end()
        elif refused:
            self.pipeline.popleft()

    def _abort(self, refused: RequestResponseCycle) -> None:
        if refused.response_started:
            self.transport.close()
        else:
            _disconnect(refused)
            self._end()

    def _end(self) -> None:
        assert self._refusal is not None
        self._has_refused, self._num_held = True, 0
        self.transport.write(self._refusal)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _discard(self) -> None:
        if self._has_refused and self._num_held > MAX_LINGER_BYTES:
            self.transport.close()


def make_default_protocol() -> None:
    """Make this protocol the default of every uvicorn in this process, without web sockets. Ray does not name a protocol."""
    HTTP_PROTOCOLS["auto"], WS_PROTOCOLS["auto"] = f"{HttpProtocol.__module__}:{HttpProtocol.__name__}", None


class _LastBody:
    """Callbacks of a parser that reads one request's body, and no request after it."""

    def __init__(self, protocol: HttpProtocol) -> None:
        self._protocol, self.is_whole = protocol, False

    def on_body(self, body: bytes) -> None:
        self._protocol.on_body(body)

    def on_message_complete(self) -> None:
        self.is_whole = True
        self._protocol.on_message_complete()


def _disconnect(cycle: RequestResponseCycle) -> None:
    cycle.disconnected, cycle.waiting_for_100_continue = True, False
    cycle.message_event.set()
