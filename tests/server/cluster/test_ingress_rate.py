"""The rate of a tenant's requests, counted by an ingress, on a clock that stands still. The replicas have fake engines."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import Message
from transformers import PreTrainedTokenizerFast

from server.access.key_ring import KeyRing
from server.access.limits import RateLimitedError
from server.app import create_app
from server.cluster.ingress import Ingress
from server.cluster.relay import answer
from server.routes.error_replies import on_table_error
from server.schemas.completions import MAX_PROMPTS
from server.settings import Settings
from tests.server.keyed import ACME, ADMIN, OTHER, bearer, make_service, write_keys
from tests.server.replies import refusal

pytestmark = pytest.mark.anyio
BODY = {"prompt": "x"}


class Answer:
    """A replica's answer."""

    def __init__(self, messages: AsyncGenerator[Sequence[Message], None]) -> None:
        self._messages = messages

    def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        return self._messages

    def cancel(self) -> None:
        raise NotImplementedError


class Replicas:
    """Applications that are asked in rotation. Records the number of requests to each."""

    def __init__(self, apps: Sequence[tuple[FastAPI, Mapping[str, Any]]]) -> None:
        self._apps = apps
        self.asked = [0] * len(apps)

    def ask(self, scope: Mapping[str, Any], body: bytes, key: str) -> Answer:  # noqa: ARG002
        place = sum(self.asked) % len(self._apps)
        self.asked[place] += 1
        app, state = self._apps[place]
        return Answer(answer(app, {**scope, "state": dict(state)}, body))

    async def ask_all(self, scope: Mapping[str, Any], body: bytes) -> Mapping[str, Sequence[Message]]:
        replies = {}
        for number, (app, state) in enumerate(self._apps):
            self.asked[number] += 1
            replies[str(number)] = [m async for some in answer(app, {**scope, "state": dict(state)}, body) for m in some]
        return replies

    async def watch(self) -> None:
        await asyncio.Event().wait()


@asynccontextmanager
async def served(
    tokenizer: PreTrainedTokenizerFast, place: Path, limits: str, num_ingresses: int = 1
) -> AsyncIterator[tuple[Replicas, list[httpx.AsyncClient]]]:
    """Serve by two replicas and some ingresses until the block ends. Yields the replicas, and a client of each ingress."""
    keys = write_keys(place, limits)
    async with AsyncExitStack() as held:
        apps = []
        for _ in range(2):
            app = create_app(make_service(tokenizer, keys, num_ingresses=num_ingresses))
            apps.append((app, await held.enter_async_context(app.router.lifespan_context(app)) or {}))
        replicas, clients = Replicas(apps), []
        for _ in range(num_ingresses):
            ingress = Ingress(replicas, KeyRing(keys), Settings(), "fake", num_ingresses)
            ingress._rate._clock = lambda: 0.0
            client = httpx.AsyncClient(transport=httpx.ASGITransport(ingress), base_url="http://ingress", headers=bearer(ACME))
            clients.append(await held.enter_async_context(client))
        yield replicas, clients


async def never() -> AsyncIterator[bytes]:
    """Raise an error if the body is read."""
    raise AssertionError("the body was read")
    yield b""


async def test_replicas_together_answer_as_many_as_one_server(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Regression: each replica counted for itself, so two of them answered twice as many requests."""
    async with served(tokenizer, tmp_path, "requests_per_minute = 7") as (replicas, [client]):
        statuses = [(await client.post("/generate", json=BODY)).status_code for _ in range(20)]
        assert statuses == [200] * 7 + [429] * 13
        assert replicas.asked == [4, 3]
        for key in (OTHER, ADMIN):
            assert (await client.post("/generate", json=BODY, headers=bearer(key))).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "num_asked"),
    [
        ("POST", "/generate", b"{", 400, 1),
        ("POST", "/generate", b"x" * ((1 << 20) + 1), 413, 0),
        ("GET", "/v1/models", b"", 200, 1),
        ("GET", "/adapters", b"", 200, 2),
        ("GET", "/nowhere", b"", 404, 1),
        ("POST", "/adapters", b"x", 403, 0),
    ],
)
async def test_every_request_of_a_tenant_counts_whatever_its_answer(
    method: str, path: str, content: bytes, status: int, num_asked: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    headers = {"Content-Type": "application/json"}
    async with served(tokenizer, tmp_path, "requests_per_minute = 2") as (replicas, [client]):
        for _ in range(2):
            assert (await client.request(method, path, content=content, headers=headers)).status_code == status
        for _ in range(3):
            refusal(await client.request(method, path, content=content, headers=headers), 429)
        assert sum(replicas.asked) == 2 * num_asked
        assert (await client.get("/health")).status_code == 200


async def test_a_request_over_the_rate_is_refused_by_its_headers_in_the_words_of_one_server(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(tokenizer, tmp_path, "requests_per_minute = 1") as (replicas, [client]):
        assert (await client.post("/generate", json=BODY)).status_code == 200
        with caplog.at_level(logging.INFO, "server.request"):
            caplog.clear()
            reply = await client.post("/generate", content=never())
            bare = await client.get("/v1/models")
    message = "tenant 'acme' may send 1 requests a minute, and has sent them; try again in 60 s"
    handler = await on_table_error(cast("Request", None), RateLimitedError(message, 60))
    assert (reply.status_code, reply.json()) == (handler.status_code, json.loads(bytes(handler.body)))
    assert (reply.headers["retry-after"], reply.headers["connection"]) == (handler.headers["retry-after"], "close")
    assert (bare.status_code, "connection" in bare.headers) == (429, False)
    assert sum(replicas.asked) == 1
    records = [record.__dict__ for record in caplog.records if record.name == "server.request"]
    assert [(record["message"], record["tenant"]) for record in records] == [
        ("POST /generate 429", "acme"),
        ("GET /v1/models 429", "acme"),
    ]


async def test_each_prompt_of_a_batch_counts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    async with served(tokenizer, tmp_path, "requests_per_minute = 6") as (replicas, [client]):

        async def complete(num_prompts: int, path: str = "/v1/completions") -> httpx.Response:
            return await client.post(path, json={"prompt": ["x"] * num_prompts})

        assert (await complete(3)).status_code == 200
        error = refusal(await complete(7), 400)  # the refused batch counts as one request
        assert (error["param"], "expected 6 at most" in error["message"]) == ("prompt", True)
        reply = await complete(3)  # its two other prompts are too many; refused, it counts as one request
        assert (
            refusal(reply, 429)["message"] == "tenant 'acme' may send 6 requests a minute, and has sent them; try again in 60 s"
        )
        assert reply.headers["retry-after"] == "60"
        refusal(await complete(MAX_PROMPTS + 1, "/generate"), 400)  # /generate takes no batch
        refusal(await complete(1), 429)
        assert sum(replicas.asked) == 3


async def test_several_ingresses_together_allow_as_many_requests_as_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    async with served(tokenizer, tmp_path, "requests_per_minute = 8", num_ingresses=2) as (replicas, clients):
        error = refusal(await clients[0].post("/v1/completions", json={"prompt": ["x"] * 5}), 400)
        assert "expected 4 at most" in error["message"]
        statuses = [(await client.post("/generate", json=BODY)).status_code for client in clients for _ in range(6)]
        assert statuses == [200] * 3 + [429] * 3 + [200] * 4 + [429] * 2
        assert sum(replicas.asked) == 8


async def test_unknown_keys_leave_nothing_behind(tmp_path: Path) -> None:
    app = Ingress(Replicas([]), KeyRing(write_keys(tmp_path, "requests_per_minute = 1")), Settings(), "fake")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        for number in range(20):
            refusal(await http.post("/generate", content=never(), headers=bearer(f"lori_guess-{number}")), 401)
    assert not app._rate._sent
