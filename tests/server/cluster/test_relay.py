"""Requests that are answered in another process."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from server.cluster.relay import answer, pass_on, portable, whole_body

pytestmark = pytest.mark.anyio
SCOPE: dict[str, Any] = {
    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/echo",
    "raw_path": b"/echo", "query_string": b"a=1", "root_path": "", "headers": [(b"x-one", b"1")], "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 2), "state": {"lock": object()}, "app": lambda: None, "extensions": {},
}  # fmt: skip


class Streamed:
    """An application whose answer never ends by itself."""

    def __init__(self) -> None:
        self.has_ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def parts() -> AsyncIterator[str]:
            try:
                while True:
                    yield "part "
                    await asyncio.sleep(0)
            finally:
                self.has_ended = True

        await StreamingResponse(parts())(scope, receive, send)


async def _echo(request: Request) -> JSONResponse:
    body = await request.body()
    return JSONResponse({"body": body.decode(), "header": request.headers["x-one"], "query": request.query_params["a"]})


ECHO = Starlette(routes=[Route("/echo", _echo, methods=["POST"])])


async def test_a_relayed_request_is_answered() -> None:
    scope = pickle.loads(pickle.dumps(portable(SCOPE)))  # noqa: S301  # our own
    messages = [message async for some in answer(ECHO, dict(scope), b"hello") for message in some]
    assert messages[0]["status"] == 200
    assert messages[1]["body"] == b'{"body":"hello","header":"1","query":"1"}'


async def test_closing_an_answer_ends_the_application() -> None:
    app = Streamed()
    answers = answer(app, dict(portable(SCOPE)), b"")
    # The headers are not sent alone, while the first token is computed: that would be one more message for each stream.
    assert [message["type"] for message in await anext(answers)] == ["http.response.start", "http.response.body"]
    await answers.aclose()
    assert app.has_ended


async def test_an_error_of_the_application_is_raised() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        async for _ in answer(broken, dict(portable(SCOPE)), b""):
            pass


@pytest.mark.parametrize(
    ("messages", "body"),
    [
        ([{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request", "body": b"b"}], b"ab"),
        ([{"type": "http.request"}], b""),
        ([{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.disconnect"}], None),
    ],
)
async def test_a_body_is_whole_or_none(messages: list[Message], body: bytes | None) -> None:
    async def receive() -> Message:
        return messages.pop(0)

    assert await whole_body(receive) == body


async def test_a_client_that_leaves_cancels() -> None:
    left, is_cancelled, sent = asyncio.Event(), asyncio.Event(), []

    async def endless() -> AsyncIterator[Sequence[Message]]:
        yield [{"type": "http.response.start"}]
        await asyncio.Event().wait()

    async def receive() -> Message:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        left.set()

    await asyncio.wait_for(pass_on(endless(), receive, send, is_cancelled.set), 60)
    assert is_cancelled.is_set()
    assert sent == [{"type": "http.response.start"}]


async def test_an_error_of_a_replica_is_raised_and_cancels_nothing() -> None:
    async def failing() -> AsyncIterator[Sequence[Message]]:
        yield [{"type": "http.response.start"}]
        raise ConnectionError("gone")

    async def receive() -> Message:
        return await asyncio.Future()

    async def send(message: Message) -> None: ...

    def cancel() -> None:
        raise AssertionError("the answer has ended by itself")

    with pytest.raises(ConnectionError, match="gone"):
        await pass_on(failing(), receive, send, cancel)
