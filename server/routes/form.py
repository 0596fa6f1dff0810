"""Forms (multipart/form-data) as they come: in memory, and refused at the first part that should not be there."""

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from server.engine.admission import RefusedError

if TYPE_CHECKING:  # it is there for type checkers alone
    from python_multipart.multipart import MultipartCallbacks


async def read_form(content_type: str, chunks: AsyncIterator[bytes], limits: Mapping[str, int]) -> dict[str, bytes]:
    """Returns the fields of a form by name; what files are called in it is of no consequence.

    Only the names in `limits` may be there, once each, with so many bytes. Raises `RefusedError`.
    """
    _, options = parse_options_header(content_type)
    form = _Form(limits)
    try:
        parser = MultipartParser(options.get(b"boundary", b""), form.callbacks)
        if not options.get(b"boundary"):
            raise RefusedError("Content-Type", "has no boundary")
        async for chunk in chunks:
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise RefusedError("body", f"is no form: {error}") from error
    if not form.is_whole:
        raise RefusedError("body", "ends before the form does")
    return {name: b"".join(parts) for name, parts in form.fields.items()}


class _Form:
    """What the parser has found so far."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.fields: dict[str, list[bytes]] = {}
        self.is_whole = False
        self._limits = limits
        self._header, self._value, self._disposition = b"", b"", b""
        self._field, self._num_bytes = "", 0
        self.callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._add,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._disposition, self._num_bytes = b"", 0

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode(errors="replace")
        if self._field not in self._limits:
            raise RefusedError(self._field[:100], f"unknown field, expected {', '.join(self._limits)}")
        if self._field in self.fields:
            raise RefusedError(self._field, "is there twice")
        self.fields[self._field] = []

    def _add(self, data: bytes, start: int, end: int) -> None:
        self._num_bytes += end - start
        if self._num_bytes > self._limits[self._field]:
            raise RefusedError(self._field, f"has more than {self._limits[self._field]} bytes")
        self.fields[self._field].append(data[start:end])

    def _end(self) -> None:
        self.is_whole = True
