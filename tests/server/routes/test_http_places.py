"""Places of requests: as many as the limit, and given back when a client leaves, an engine dies or a request is refused."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from typing import Any, cast

import httpx
import pytest
from starlette.types import Message
from transformers import PreTrainedTokenizerFast

from server.engine.adapters.registry import Registry
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.generate_request import GenerateRequest
from server.engine.request import Request, TextEvent
from server.engine.step import Emit
from server.engine.thread import EngineThread
from server.routes.event_stream import EventStream
from server.service.service import Service
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.live import HOST, LIMIT_S, RUNNING, Live, events, serve_here, wait_until
from tests.server.replies import FOR_EVER, USAGE, refusal
from tests.server.rig import FakeEngine


@contextmanager
def hanging(live: Live, **body: object) -> Iterator[socket.socket]:
    """Send a request on a connection of its own, and close it without reading an answer when the block ends."""
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", live.port), timeout=60)) as connection:
        connection.sendall(head.encode() + content)
        yield connection


def is_answered(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return False


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_while_it_is_served_frees_its_place(live: Live, is_stream: bool) -> None:
    """Free the place at once, while an earlier client that asks for as much is still being served."""
    live.wait_for(running=0, waiting=0)
    with hanging(live, prompt="a", max_tokens=FOR_EVER) as other:
        live.wait_for(running=1)
        long = {"prompt": "b" * 3000, "max_tokens": FOR_EVER - 3000}
        with hanging(live, **long, stream=is_stream, adapter="math") as connection:
            live.wait_for(running=2)
            if is_stream:
                heard = b""
                while b"event: token" not in heard:
                    heard += connection.recv(4096)
            with_both = live.metric(USAGE)
            assert with_both > 0.35, "the usage includes at least the long prompt"
        live.wait_for(running=1)
        assert live.metric(USAGE) < with_both - 0.2, "the departed client's blocks are free, though the other grows"
        assert not is_answered(other)
    live.wait_for(running=0)
    assert live.metric(USAGE) == 0


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_while_it_waits_frees_its_place(live: Live, is_stream: bool) -> None:
    live.wait_for(running=0, waiting=0)
    # The prompts have no common prefix, or they would share blocks.
    one_body, other_body = ({"prompt": letter * 2500, "max_tokens": FOR_EVER - 2500} for letter in "ab")
    with hanging(live, **one_body) as one, hanging(live, **other_body) as other:
        live.wait_for(running=2)
        with hanging(live, prompt="c" * 3600, max_tokens=1, stream=is_stream):
            live.wait_for(waiting=1)
            assert live.metric(RUNNING) == 2
        live.wait_for(waiting=0)
        assert live.metric(RUNNING) == 2
        assert not is_answered(one), "the third client did not take the place of the first"
        assert not is_answered(other)
    live.wait_for(running=0)


@contextmanager
def served(tokenizer: PreTrainedTokenizerFast, engine: FakeEngine, **settings: int) -> Iterator[tuple[httpx.Client, Service]]:
    """Serve an app with a fake engine in this process; yield a client and the service."""
    service = Service(
        settings=Settings(**{"allow_host": [HOST]} | settings),
        base_model="fake",
        registry=Registry([]),
        admission=Admission(tokenizer, Registry([]), 100),
        engine=EngineThread(cast(Engine, engine)),
        metrics=Metrics("fake"),
    )
    with serve_here(service) as client:
        yield client, service


@pytest.mark.slow
def test_when_the_engine_dies_a_waiting_client_is_told_why(tokenizer: PreTrainedTokenizerFast) -> None:
    with served(tokenizer, FakeEngine(dies_at=2)) as (client, _):
        error = refusal(client.post("/generate", json={"prompt": "x"}), 500)
        assert "out of luck" in error["message"]
        assert error["type"] == "InternalServerError"


@pytest.mark.slow
def test_when_the_engine_dies_a_stream_ends_with_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with (
        served(tokenizer, FakeEngine(dies_at=2)) as (client, _),
        client.stream("POST", "/generate", json={"prompt": "x", "stream": True}) as reply,
    ):
        (first, token), (last, data) = events(reply.iter_lines())
    assert (first, token["text"]) == ("token", "x")
    assert last == "error"
    assert "out of luck" in data["error"]["message"]
    assert data["error"]["code"] == 500


@pytest.mark.slow
def test_a_dead_engine_makes_the_server_unready_and_unhealthy(tokenizer: PreTrainedTokenizerFast) -> None:
    with served(tokenizer, FakeEngine(dies_at=1)) as (client, _):
        assert client.get("/ready").status_code == 200
        assert client.post("/generate", json={"prompt": "x"}).status_code == 500
        refusal(client.get("/health"), 503)
        refusal(client.get("/ready"), 503)
        for is_stream in (False, True):
            error = refusal(client.post("/generate", json={"prompt": "x", "stream": is_stream}), 503)
            assert error["type"] == "ServiceUnavailableError"


class SlowAdmission:
    """A fake admission that blocks until `may_go_on` is set."""

    def __init__(self, admission: Admission) -> None:
        self._admission, self.max_context = admission, admission.max_context
        self.may_go_on = threading.Event()

    def admit(self, ask: GenerateRequest) -> Request:
        assert self.may_go_on.wait(LIMIT_S)
        return self._admission.admit(ask)


def test_requests_under_admission_occupy_their_places(tokenizer: PreTrainedTokenizerFast) -> None:
    with served(tokenizer, FakeEngine(), max_requests=2) as (client, service), ThreadPoolExecutor(2) as pool:
        slow = service.admission = cast(Any, SlowAdmission(service.admission))
        first = [pool.submit(client.post, "/generate", json={"prompt": "x", "stream": is_stream}) for is_stream in (False, True)]
        wait_until(lambda: service.num_requests == 2, "two requests")
        refusal(client.post("/generate", json={"prompt": "x"}), 429)
        slow.may_go_on.set()
        assert [reply.result().status_code for reply in first] == [200, 200]
        wait_until(lambda: service.num_requests == 0, "the ends of both requests")
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200


def test_a_request_that_is_refused_gives_its_place_back(tokenizer: PreTrainedTokenizerFast) -> None:
    with served(tokenizer, FakeEngine(), max_requests=1) as (client, _):
        for _ in range(3):
            refusal(client.post("/generate", json={"prompt": ""}), 400)
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200


class LoudEngine(FakeEngine):
    """A fake engine that generates a megabyte of text in every step."""

    def submit(self, request: Request, emit: Emit) -> None:
        super().submit(request, lambda event: emit(TextEvent("x" * 2**20) if isinstance(event, TextEvent) else event))


@pytest.mark.slow
def test_a_client_that_does_not_read_its_stream_loses_its_place(tokenizer: PreTrainedTokenizerFast) -> None:
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    engine = LoudEngine(num_steps=64)
    with served(tokenizer, engine, max_requests=1, max_unread_s=1) as (client, service):
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as silent:
            silent.sendall(head.encode() + body)
            wait_until(lambda: bool(engine.emitted), "the first step")
            wait_until(lambda: service.num_requests == 0, "the place to be freed")
            assert client.post("/generate", json={"prompt": "x"}).status_code == 200
            read = 0
            with suppress(ConnectionResetError):  # the system resets a connection whose client reads nothing
                while chunk := silent.recv(2**20):
                    read += len(chunk)
            assert 0 < read < 64 * 2**20, "not the whole answer"


def test_a_client_that_leaves_before_its_stream_begins_gives_its_place_back() -> None:
    left: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"never"

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        place = AsyncExitStack()
        place.callback(left.append, "its place")
        await EventStream(events(), place, LIMIT_S)({"type": "http"}, receive, send)

    asyncio.run(test())
    assert left == ["its place"]


def test_more_requests_than_the_limit_are_429(tokenizer: PreTrainedTokenizerFast) -> None:
    with (
        served(tokenizer, FakeEngine(num_steps=10**9), max_requests=1) as (client, _),
        client.stream("POST", "/generate", json={"prompt": "x", "stream": True}) as reply,
    ):
        lines = reply.iter_lines()
        assert next(lines) == "event: token"
        refused = client.post("/generate", json={"prompt": "x"})
        error = refusal(refused, 429)
        assert error["type"] == "RateLimitError"
        assert refused.headers["retry-after"] == "1"
        assert client.get("/ready").status_code == 200
