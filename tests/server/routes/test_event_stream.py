"""Streams of events: the comments sent between events, and the return of the stream's place."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

from starlette.types import Message

from server.routes.event_stream import KEEP_ALIVE, EventStream
from tests.server.live import LIMIT_S

SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "path": "/", "headers": []}


class Client:
    """An ASGI client that records the bodies an app sends, and leaves when `leaves` is set."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.has_received = asyncio.Event()
        self.leaves = asyncio.Event()

    async def send(self, message: Message) -> None:
        if body := message.get("body"):
            self.bodies.append(body)
            self.has_received.set()

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


def stream(events: AsyncGenerator[bytes, None], keep_alive_s: float) -> tuple[EventStream, list[str]]:
    """Return a stream, and a list that records the return of its place."""
    ended: list[str] = []
    place = AsyncExitStack()
    place.callback(ended.append, "given back")
    return EventStream(events, place, LIMIT_S, keep_alive_s), ended


def test_a_waiting_client_gets_comments_between_events() -> None:
    async def test() -> None:
        client = Client()

        async def events() -> AsyncGenerator[bytes, None]:
            for event in (b"one", b"two"):
                yield event
                while client.bodies[-1] != KEEP_ALIVE:
                    client.has_received.clear()
                    await client.has_received.wait()

        response, ended = stream(events(), keep_alive_s=0.01)
        await response(SCOPE, client.receive, client.send)
        assert [body for body in client.bodies if body != KEEP_ALIVE] == [b"one", b"two"]
        assert client.bodies[-1] == KEEP_ALIVE
        assert ended == ["given back"]

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def test_a_client_that_leaves_between_events_gives_its_place_back() -> None:
    async def test() -> None:
        client, closed = Client(), asyncio.Event()

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                yield b"one"
                client.leaves.set()
                await asyncio.Event().wait()
            finally:
                closed.set()

        response, ended = stream(events(), keep_alive_s=LIMIT_S)
        await response(SCOPE, client.receive, client.send)
        assert client.bodies == [b"one"]
        assert closed.is_set()
        assert ended == ["given back"]

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))
