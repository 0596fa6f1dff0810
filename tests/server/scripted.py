"""A fake server of raw bytes. It handles each connection as the next part of its script prescribes."""

import asyncio
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from anyio.from_thread import start_blocking_portal

UNREAD = "unread"
"""Script entry: end the connection before the request is read."""
RESET = "reset"
"""Script entry: read the request, and reset the connection."""
SILENT = "silent"
"""Script entry: read the request, and send nothing."""
LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


@dataclass(slots=True)
class Scripted:
    """A fake server. For each connection its script has either raw bytes, after which the connection ends, or an entry above."""

    script: Sequence[bytes | str]
    url: str = ""
    requests: list[bytes] = field(default_factory=list)
    """The head and body of each request; empty if it was not read."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one connection."""
        entry = self.script[len(self.requests)]
        self.requests.append(b"" if entry == UNREAD else await read_request(reader))
        if isinstance(entry, bytes):
            writer.write(entry)
            await writer.drain()
        elif entry == RESET:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif entry == SILENT:
            await reader.read()
        writer.close()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Return the head and body of a request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = LENGTH.search(head)
    return head + (await reader.readexactly(int(length[1])) if length else b"")


@contextmanager
def scripted(*script: bytes | str) -> Iterator[Scripted]:
    """Serve `script` until the block ends. A connection beyond the script is an error in the server."""
    fake = Scripted(script)
    with start_blocking_portal() as portal:
        server = portal.call(asyncio.start_server, fake.answer, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield fake
        finally:
            portal.call(server.close)
            portal.call(server.wait_closed)


def reply(body: str, status: str = "200 OK", headers: str = "") -> bytes:
    """Return a complete reply."""
    content = body.encode()
    return f"HTTP/1.1 {status}\r\n{headers}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content


def chunks(*parts: bytes, is_whole: bool = True) -> bytes:
    """Return a stream of events in HTTP chunks. Unless `is_whole`, it lacks the last chunk."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head + body + (b"0\r\n\r\n" if is_whole else b"")
