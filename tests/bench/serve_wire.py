"""A client of servers that answer a POST with server-sent events. It records the time of each piece of text.

The client does as little work as possible, since it shares the machine with the server that it measures.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

MAX_LINE_BYTES = 2**20


class FailedError(Exception):
    """A server that refused a request, did not start, or gave another answer than requested."""


@dataclass(slots=True)
class Reply:
    """The answer to one request. Times are those of `time.perf_counter`. `times` has the arrival time of each piece of text."""

    asked: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    ended: float = 0.0
    num_prompt: int = 0
    num_completion: int = 0

    @property
    def first_s(self) -> float:
        """Seconds to the first token, or to the end of the answer if no token gave text."""
        return (self.times[0] if self.times else self.ended) - self.asked

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in pairwise(self.times)]


async def ask(port: int, path: str, document: Mapping[str, Any], reply: Reply) -> Reply:
    """Send a request and fill in `reply` as the answer arrives, until its end. Raises `FailedError`."""
    async with aclosing(_events(port, path, document)) as events:
        async for came, event in events:
            if "error" in event:
                raise FailedError(f"POST {path}: {event['error']}")
            if event.get("choices") or "text" in event:
                reply.times.append(came)
            if usage := event.get("usage"):
                reply.num_prompt, reply.num_completion = usage["prompt_tokens"], usage["completion_tokens"]
    reply.ended = time.perf_counter()
    return reply


async def _events(port: int, path: str, document: Mapping[str, Any]) -> AsyncIterator[tuple[float, dict[str, Any]]]:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MAX_LINE_BYTES)
    except OSError as error:
        raise FailedError(f"POST {path}: {error}") from error
    try:
        body = json.dumps(document).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0].decode()
        if " 200 " not in f"{status} ":
            raise FailedError(f"POST {path}: {status}: {(await reader.read(2000)).decode(errors='replace')}")
        rest = b""
        while piece := await _chunk(reader):
            came = time.perf_counter()
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield came, json.loads(line.removeprefix(b"data: "))
    finally:
        writer.close()


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    """Return a chunk of HTTP/1.1's chunked coding. The last chunk is empty."""
    size = int((await reader.readline()).split(b";")[0] or b"0", 16)
    content = await reader.readexactly(size)
    await reader.readline()
    return content
