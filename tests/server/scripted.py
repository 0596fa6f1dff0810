"""A fake of a server, byte by byte: it treats each connection as the next part of its script says."""

import asyncio
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from anyio.from_thread import start_blocking_portal

UNREAD = "unread"
"""Ends the connection before the request is read."""
RESET = "reset"
"""Reads the request, and resets the connection."""
SILENT = "silent"
"""Reads the request, and says nothing."""
LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


@dataclass(slots=True)
class Scripted:
    """What it says to each connection: raw bytes, after which the connection ends, or one of the words above."""

    script: Sequence[bytes | str]
    url: str = ""
    requests: list[bytes] = field(default_factory=list)
    """What was asked, head and body; empty where it was not read."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Treats one connection."""
        said = self.script[len(self.requests)]
        self.requests.append(b"" if said == UNREAD else await read_request(reader))
        if isinstance(said, bytes):
            writer.write(said)
            await writer.drain()
        elif said == RESET:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif said == SILENT:
            await reader.read()
        writer.close()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Returns head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = LENGTH.search(head)
    return head + (await reader.readexactly(int(length[1])) if length else b"")


@contextmanager
def scripted(*script: bytes | str) -> Iterator[Scripted]:
    """Serves `script` until the block ends; a connection that it does not foresee is an error there."""
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
    """Returns a whole reply."""
    content = body.encode()
    return f"HTTP/1.1 {status}\r\n{headers}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content


def chunks(*parts: bytes, is_whole: bool = True) -> bytes:
    """Returns a stream of events in chunks of HTTP; one that is not whole lacks its last chunk."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head + body + (b"0\r\n\r\n" if is_whole else b"")
