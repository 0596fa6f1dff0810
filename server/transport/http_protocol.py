"""uvicorn's HTTP protocol with a limit on what is no body: it would hold the head of a request without end."""

import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.schemas.errors import error_reply

MAX_HELD_BYTES = 64 * 1024


class HttpProtocol(HttpToolsProtocol):
    """Answers 431 to a head of more than about `MAX_HELD_BYTES` bytes, and closes the connection; also at a longer trailer."""

    _num_held = 0
    """Bytes that came since the application last heard anything."""

    def data_received(self, data: bytes) -> None:
        """Takes what came."""
        self._num_held += len(data)
        super().data_received(data)
        if self._num_held > MAX_HELD_BYTES and not self.transport.is_closing():
            self._refuse()

    def on_headers_complete(self) -> None:
        """Hears that a head is whole."""
        self._num_held = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hears a part of a body."""
        self._num_held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Hears the end of a request."""
        self._num_held = 0
        super().on_message_complete()

    def _refuse(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            said = f"the request's head is longer than {MAX_HELD_BYTES} bytes"
            body = json.dumps(error_reply(status, "BadRequestError", said, None)).encode()
            head = f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
