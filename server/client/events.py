"""Server-sent events of POST /generate, from bytes as they come."""

from collections.abc import Iterator

import httpx

from server.client.calls import parsed
from server.client.errors import failed
from server.schemas.errors import ErrorReply
from server.schemas.generation import DoneData, TokenData

StreamEvent = TokenData | DoneData
KINDS: dict[str, type[TokenData] | type[DoneData]] = {"token": TokenData, "done": DoneData}


class EventReader:
    """Reads one stream that ends after `num_answers` `done` events.

    Lines end at newlines alone: text may hold what Python, too, takes for the end of a line.
    """

    def __init__(self, num_answers: int) -> None:
        self.has_begun = False
        """An event has come."""
        self._num_open = num_answers
        self._unread = b""
        self._name = ""
        self._data: list[bytes] = []

    def read(self, chunk: bytes) -> Iterator[StreamEvent]:
        """Yield the events that `chunk` completes. Raises `ApiError` at an `error`."""
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        for line in lines:
            if not line.rstrip(b"\r"):
                yield from self._event()
            else:
                self._take(line.rstrip(b"\r"))

    def check_end(self) -> None:
        """Raise httpx's error of a connection that ended too early where the stream did, which a gateway may end as if it were
        whole."""
        if self._num_open > 0:
            raise httpx.RemoteProtocolError(f"the stream ended, and {self._num_open} answers had not")

    def _take(self, line: bytes) -> None:
        # Without a key it is a comment.
        key, _, value = line.partition(b":")
        if key == b"event":
            self._name = value.strip().decode()
        elif key == b"data":
            self._data.append(value.removeprefix(b" "))

    def _event(self) -> Iterator[StreamEvent]:
        name, data = self._name, b"\n".join(self._data)
        self._name, self._data = "", []
        if not data:
            return
        if name == "error":
            raise failed(parsed(ErrorReply, data).error)
        if name not in KINDS:  # a newer server's, which must be possible to read past
            return
        self._num_open -= name == "done"
        self.has_begun = True
        yield parsed(KINDS[name], data)
