"""uvicorn's HTTP protocol, for clients that speak another or leave: what cannot be read is answered as any error is.

Answers come in the order of requests, and there may be several under way on one connection. uvicorn tells only the last of them
that the client left, and writes its refusals between the answers.
"""

import json
from http import HTTPStatus

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.schemas.errors import error_reply
from server.transport.absolute_form import take_authority

MAX_HELD_BYTES = 64 * 1024
"""uvicorn would hold a head without end."""
LINGER_S = 1.0
"""Closing while more comes would reset the connection, and the client might never read why."""
MAX_LINGER_BYTES = 1024 * 1024


class HttpProtocol(HttpToolsProtocol):
    """Answers 431 to a head of more than about `MAX_HELD_BYTES` bytes, 400 to chunk extensions or a trailer of that length and to
    what is no HTTP, and closes the connection."""

    _num_held = 0
    """Bytes that came since the application last heard anything."""
    _is_in_body = False
    """Whether the request that is read belongs to `cycle`; else it has none yet."""
    _due: RequestResponseCycle | None = None
    """The first that is not answered, or the last that was."""
    _refusal: bytes | None = None
    """What is said at the end: nothing is read any more."""
    _is_over = False

    def data_received(self, data: bytes) -> None:
        """Takes what came."""
        self._num_held += len(data)
        if self._refusal is not None:
            self._discard()
            return
        super().data_received(data)
        if self._num_held > MAX_HELD_BYTES and self._refusal is None and not self.transport.is_closing():
            self._refuse_length()

    def connection_lost(self, exc: Exception | None) -> None:
        """Hears that the client left."""
        super().connection_lost(exc)
        if self._due:
            _disconnect(self._due)

    def on_headers_complete(self) -> None:
        """Hears that a head is whole."""
        self._num_held = 0
        take_authority(self.url, self.headers)
        super().on_headers_complete()
        self._is_in_body = True

    def on_body(self, body: bytes) -> None:
        """Hears a part of a body."""
        self._num_held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Hears the end of a request."""
        self._num_held = 0
        self._is_in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Hears the end of an answer."""
        is_last = not self.pipeline
        super().on_response_complete()
        if self._refusal is not None and is_last and not self.transport.is_closing():
            self._end()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's signature
        """Refuses what is no HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, "the request is no HTTP that can be read")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._due = cycle
        super()._start_asgi_task(cycle, app)

    def _refuse_length(self) -> None:
        if self._is_in_body:
            said = f"a chunk's extensions or the trailer are longer than {MAX_HELD_BYTES} bytes"
            self._refuse(HTTPStatus.BAD_REQUEST, said)
        else:
            said = f"the request's head is longer than {MAX_HELD_BYTES} bytes"
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, said)

    def _refuse(self, status: HTTPStatus, said: str) -> None:
        # Now, or when what was asked before is answered.
        self._refusal = _refusal(status, said)
        refused, due = self.cycle if self._is_in_body else None, self._due
        if refused and refused is due:
            self._cut(refused)
        elif due is None or due.response_complete:
            self._end()
        elif refused:
            self.pipeline.popleft()

    def _cut(self, refused: RequestResponseCycle) -> None:
        if refused.response_started:
            self.transport.close()
        else:
            _disconnect(refused)
            self._end()

    def _end(self) -> None:
        assert self._refusal is not None
        self._is_over, self._num_held = True, 0
        self.transport.write(self._refusal)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _discard(self) -> None:
        if self._is_over and self._num_held > MAX_LINGER_BYTES:
            self.transport.close()


def _disconnect(cycle: RequestResponseCycle) -> None:
    cycle.disconnected, cycle.waiting_for_100_continue = True, False
    cycle.message_event.set()


def _refusal(status: HTTPStatus, said: str) -> bytes:
    body = json.dumps(error_reply(status, "BadRequestError", said, None)).encode()
    head = f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body
