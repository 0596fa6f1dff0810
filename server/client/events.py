"""Server-sent events of POST /generate, parsed from bytes as they come."""

from collections.abc import Iterator

import httpx

from server.client.calls import parsed
from server.client.errors import failed
from server.schemas.errors import ErrorReply
from server.schemas.generation import DoneData, TokenData

StreamEvent = TokenData | DoneData
KINDS: dict[str, type[TokenData] | type[DoneData]] = {"token": TokenData, "done": DoneData}


class EventReader:
    """Parser of one stream, which ends after `num_answers` `done` events.

    Lines end at newlines only: text may contain other characters that Python also takes for line ends.
    """

    def __init__(self, num_answers: int) -> None:
        self.has_begun = False
        """Whether an event has come."""
        self._num_open = num_answers
        self._unread = b""
        self._name = ""
        self._data: list[bytes] = []

    def read(self, chunk: bytes) -> Iterator[StreamEvent]:
        """Yield the events that `chunk` completes. Raises `ApiError` at an `error` event."""
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        for line in lines:
            if not line.rstrip(b"\r"):
                yield from self._finish_event()
            else:
                self._add_line(line.rstrip(b"\r"))

    def check_end(self) -> None:
        """Raise httpx's error for a connection that ended too early if the stream did.

        A gateway may end such a stream as if it were whole.
        """
        if self._num_open > 0:
            raise httpx.RemoteProtocolError(f"the stream ended, and {self._num_open} answers had not")

    def _add_line(self, line: bytes) -> None:
        # A line without a key is a comment.
        key, _, value = line.partition(b":")
        if key == b"event":
            self._name = value.strip().decode()
        elif key == b"data":
            self._data.append(value.removeprefix(b" "))

    def _finish_event(self) -> Iterator[StreamEvent]:
        name, data = self._name, b"\n".join(self._data)
        self._name, self._data = "", []
        if not data:
            return
        if name == "error":
            raise failed(parsed(ErrorReply, data).error)
        if name not in KINDS:  # an event of a newer server: skip it
            return
        self._num_open -= name == "done"
        self.has_begun = True
        yield parsed(KINDS[name], data)
