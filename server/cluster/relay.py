"""An ASGI request and its answer, relayed from one process to another: the one that was asked, and the one that answers.

The body goes whole; the answer comes as it is made, a list of messages at a time. Knows no Ray.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PORTABLE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client",
    "server",
)  # fmt: skip
"""What of a scope means anything in another process."""
HEAD = "http.response.start"
Answers = AsyncIterable[Sequence[Message]]


def portable(scope: Scope) -> Mapping[str, Any]:
    """Return what of `scope` is sent with a request."""
    return {key: scope[key] for key in PORTABLE if key in scope}


async def whole_body(receive: Receive) -> bytes | None:
    """Return the request's body; None where the client left before it was whole."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def pass_on(answers: Answers, receive: Receive, send: Send, cancel: Callable[[], None]) -> None:
    """Send what `answers` brings to the client; where that leaves before the end, calls `cancel` and returns.

    Raises what `answers` raises.
    """
    left = asyncio.ensure_future(_until_left(receive))
    sending = asyncio.ensure_future(_send_all(answers, send))
    try:
        await asyncio.wait({left, sending}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
    finally:
        if not sending.done():
            cancel()
        for task in (left, sending):
            task.cancel()
        await asyncio.gather(left, sending, return_exceptions=True)


async def _send_all(answers: Answers, send: Send) -> None:
    async for messages in answers:
        for message in messages:
            await send(message)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Sequence[Message], None]:
    """Yield what `app` answers to a relayed request, all messages that are there at a time; the head with what follows it.

    Closing it tells `app` that the client has left, and waits until it is done. Raises what `app` raises.
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
        if not has_left.is_set():  # what nobody hears is dropped, as servers do
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
            while message and (message["type"] == HEAD or not sent.empty()):
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
