"""Relay of an ASGI request and its answer between the process that accepted it and the process that answers.

The body is sent as a whole; the answer comes as it is made, in lists of messages. Knows no Ray.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PORTABLE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client",
    "server",
)  # fmt: skip
"""Keys of a scope that are meaningful in another process."""
RESPONSE_START = "http.response.start"
Answers = AsyncIterable[Sequence[Message]]


def portable(scope: Scope) -> Mapping[str, Any]:
    """Return the part of `scope` that is sent with a request."""
    return {key: scope[key] for key in PORTABLE if key in scope}


async def whole_body(receive: Receive) -> bytes | None:
    """Return the request's body; None if the client leaves before it is complete."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def pass_on(answers: Answers, receive: Receive, send: Send, cancel: Callable[[], None]) -> None:
    """Send the messages of `answers` to the client. If the client leaves before the end, call `cancel` and return.

    Raises what `answers` raises.
    """
    disconnected = asyncio.ensure_future(_until_disconnect(receive))
    sending = asyncio.ensure_future(_send_all(answers, send))
    try:
        await asyncio.wait({disconnected, sending}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
    finally:
        if not sending.done():
            cancel()
        for task in (disconnected, sending):
            task.cancel()
        await asyncio.gather(disconnected, sending, return_exceptions=True)


async def _send_all(answers: Answers, send: Send) -> None:
    async for messages in answers:
        for message in messages:
            await send(message)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Sequence[Message], None]:
    """Yield the answer of `app` to a relayed request, as lists of the messages that are there. The headers come with the next
    message.

    Closing the generator tells `app` that the client has left, and waits until `app` is done. Raises what `app` raises.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    is_read, has_left = False, asyncio.Event()

    async def receive() -> Message:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if not has_left.is_set():  # messages for a client that has left are dropped, as servers do
            sent.put_nowait(message)

    async def run() -> None:
        try:
            await app(scope, receive, send)
        finally:
            sent.put_nowait(None)

    running = asyncio.ensure_future(run())
    try:
        while (message := await sent.get()) is not None:
            messages = [message]
            while message and (message["type"] == RESPONSE_START or not sent.empty()):
                if message := await sent.get():
                    messages.append(message)
            yield messages
            if message is None:
                break
        await running
    finally:
        has_left.set()
        if not running.done():
            await asyncio.shield(running)
