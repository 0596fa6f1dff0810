"""Routing, retries, merged replies and refusals of an ingress. Fakes stand for the replicas."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import anyio
import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message
from transformers import PreTrainedTokenizerFast

from server.access.caller import Caller, ForbiddenError
from server.access.key_ring import KeyRing
from server.cluster.ingress import MAX_TRIES, Ingress, NoReplicaError, ReplicaLostError
from server.routes.dependencies import require_admin
from server.routes.error_replies import on_table_error
from server.settings import MAX_RECEIVED, Settings
from tests.server.keyed import ACME, ADMIN, MONITOR, bearer, make_service, write_keys
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio
BASE = "base"
NAMED: dict[str, Any] = {"allow_host": ["ingress"]}
"""The host name by which clients of these tests call the ingress."""


class FakeStream:
    """An answer that repeats the request. It dies before the answer, within it, or oddly, as `dies` has it."""

    def __init__(self, asked: dict[str, Any], dies: str | None) -> None:
        self._asked, self._dies = asked, dies

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        if self._dies == "before":
            raise ReplicaLostError("the replica was lost")
        if self._dies == "oddly":
            raise RuntimeError("nobody knows it")
        headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", b"twice"),
            (b"access-control-allow-origin", b"https://of.replica"),
        ]
        content = json.dumps(self._asked).encode()
        yield [
            {"type": "http.response.start", "status": 200, "headers": headers},
            {"type": "http.response.body", "body": content[:1], "more_body": True},
        ]
        if self._dies == "within":
            raise ReplicaLostError("the replica was lost")
        yield [{"type": "http.response.body", "body": content[1:]}]

    def cancel(self) -> None:
        raise NotImplementedError


class FakeReplicas:
    """Fake replicas that record their requests."""

    def __init__(
        self,
        deaths: Sequence[str | None] = (),
        statuses: Mapping[str, int] | None = None,
        bodies: Mapping[str, bytes] | None = None,
    ) -> None:
        self.deaths, self.statuses = list(deaths), {"a": 200, "b": 200} if statuses is None else statuses
        self.bodies = bodies or {}
        self.asked: list[tuple[str, str, bytes]] = []
        self.bodies_of_all: list[bytes] = []
        self.is_watched, self.was_watched = asyncio.Event(), asyncio.Event()

    def ask(self, scope: Mapping[str, Any], body: bytes, key: str) -> FakeStream:
        if not self.statuses:
            self.asked.append((key, scope["path"], body))
            raise NoReplicaError
        self.asked.append((key, scope["path"], body))
        echo = {"key": key, "authorization": [v.decode() for k, v in scope["headers"] if k == b"authorization"]}
        return FakeStream(echo, self.deaths.pop(0) if self.deaths else None)

    async def ask_all(self, scope: Mapping[str, Any], body: bytes) -> Mapping[str, Sequence[Message]]:  # noqa: ARG002
        self.bodies_of_all.append(body)
        if self.deaths:
            raise RuntimeError("nobody knows it")
        if not self.statuses:
            raise NoReplicaError
        return {
            name: [
                {"type": "http.response.start", "status": status, "headers": []},
                {"type": "http.response.body", "body": self.bodies.get(name, f'up{{of="{name}"}} {status}\n'.encode())},
            ]
            for name, status in self.statuses.items()
        }

    async def watch(self) -> None:
        self.is_watched.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.was_watched.set()


def client(replicas: FakeReplicas, admin: Path | None = None, **settings: Any) -> httpx.AsyncClient:
    """Return a client of an ingress. With a folder `admin`, keys are written there, and the client is an admin's."""
    keys = KeyRing(write_keys(admin)) if admin else None
    app = Ingress(replicas, keys, Settings(**NAMED | settings), BASE)
    headers = bearer(ADMIN) if admin else {}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress", headers=headers)


async def test_replicas_are_watched_as_long_as_the_ingress_lives() -> None:
    replicas, sent = FakeReplicas(), list[str]()

    async def receive() -> Message:
        if not sent:
            return {"type": "lifespan.startup"}
        await replicas.is_watched.wait()
        assert not replicas.was_watched.is_set()
        return {"type": "lifespan.shutdown"}

    async def send(message: Message) -> None:
        sent.append(message["type"])

    await asyncio.wait_for(Ingress(replicas, None, Settings(), BASE)({"type": "lifespan"}, receive, send), LIMIT_S)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert replicas.was_watched.is_set()


async def test_a_request_is_routed_by_its_adapters() -> None:
    replicas = FakeReplicas()
    async with client(replicas) as http:
        reply = await http.post("/generate", json={"adapter": ["safety", "math"]})
    assert reply.json()["key"] == "math+safety"
    assert "x-request-id" not in reply.headers


async def test_a_replica_that_dies_before_it_answers_is_replaced_by_another() -> None:
    replicas = FakeReplicas(["before"] * (MAX_TRIES - 1))
    async with client(replicas) as http:
        reply = await http.post("/generate", json={"adapter": "math"})
    assert reply.status_code == 200
    assert replicas.asked == [("math", "/generate", b'{"adapter":"math"}')] * MAX_TRIES


async def test_a_client_is_asked_to_retry_if_all_replicas_die() -> None:
    async with client(FakeReplicas(["before"] * MAX_TRIES)) as http:
        reply = await http.post("/generate", json={"adapter": "math"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["message"] == "the replica was lost"


@pytest.mark.parametrize("path", ["/metrics", "/adapters", "/adapters/math"])
async def test_a_client_is_asked_to_retry_a_view_that_no_replica_could_show(path: str) -> None:
    async with client(FakeReplicas(statuses={})) as http:
        reply = await http.get(path)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("path", ["/generate", "/ready"])
async def test_a_request_is_tried_once_if_there_is_no_replica(path: str) -> None:
    replicas = FakeReplicas(statuses={})
    async with client(replicas) as http:
        reply = await http.post(path, json={})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["message"] == "no replica is there"
    assert len(replicas.asked) == 1


@pytest.mark.parametrize("path", ["/generate", "/adapters/math/load"])
async def test_an_unexpected_error_is_answered_in_our_words_and_logged(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with client(FakeReplicas(["oddly"]), tmp_path) as http:
        reply = await http.post(path, json={"adapter": "math"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "the server failed; its log says why")
    assert "nobody knows it" in caplog.text


async def test_an_answer_that_has_begun_is_not_retried() -> None:
    replicas = FakeReplicas(["within"])
    async with client(replicas) as http:
        with pytest.raises(ReplicaLostError):
            await http.post("/generate", json={"adapter": "math"})
    assert len(replicas.asked) == 1


@pytest.mark.parametrize("statuses", [{"a": 200, "b": 409}, {"a": 409, "b": 200}])
async def test_the_refusal_of_one_replica_is_the_answer_to_a_change(statuses: dict[str, int], tmp_path: Path) -> None:
    async with client(FakeReplicas(statuses=statuses), tmp_path) as http:
        reply = await http.post("/adapters/math/load")
    assert reply.status_code == 409


async def test_a_change_that_found_no_replica_is_not_to_be_retried(tmp_path: Path) -> None:
    async with client(FakeReplicas(statuses={}), tmp_path) as http:
        reply = await http.post("/adapters/math/load")
    assert reply.status_code == 503
    assert "retry-after" not in reply.headers


async def test_metrics_are_those_of_all_replicas() -> None:
    replicas = FakeReplicas()
    async with client(replicas) as http:
        text = (await http.get("/metrics")).text
    assert len(replicas.bodies_of_all) == 1
    assert 'up{of="a",replica="a"} 200.0' in text
    assert 'up{of="b",replica="b"} 200.0' in text


async def test_adapters_are_shown_with_the_figures_of_all_replicas() -> None:
    row = {
        "name": "math", "version": "1", "tier": "disk", "is_pinned": False, "bytes_loaded": 0, "bytes_resident": 0,
        "num_using": 0, "num_requests": 2, "last_used": 1.0,
    }  # fmt: skip
    replicas = FakeReplicas(bodies={"a": json.dumps(row).encode(), "b": json.dumps(row | {"tier": "loaded"}).encode()})
    async with client(replicas) as http:
        reply = await http.get("/adapters/math")
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == row | {"tier": "loaded", "num_requests": 4}
    async with client(FakeReplicas(statuses={"a": 200, "b": 404})) as http:
        assert (await http.get("/adapters/math")).status_code == 404


async def test_a_body_that_is_too_long_reaches_no_replica() -> None:
    replicas = FakeReplicas()

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 1024

    async with client(replicas, max_body_bytes=2048) as http:
        declared, streamed = await http.post("/generate", content=b"x" * 3072), await http.post("/generate", content=parts())
    assert (declared.status_code, streamed.status_code) == (413, 413)
    assert replicas.asked == []


async def never() -> AsyncIterator[bytes]:
    """Raise an error if the body is read."""
    raise AssertionError("the body was read")
    yield b""


@pytest.mark.parametrize(
    ("path", "sent", "has_keys", "status"),
    [
        ("/adapters", f"Bearer {ACME}", True, 403),
        ("/adapters", "Bearer guessed", True, 401),
        ("/adapters", None, True, 401),
        ("/adapters", None, False, 403),
        ("/generate", None, True, 401),
        ("/generate", f"Bearer {MONITOR}", True, 403),
    ],
)
async def test_a_forbidden_request_is_refused_without_a_replica_and_its_body_is_not_read(
    path: str, sent: str | None, has_keys: bool, status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: only a replica refused such requests; without one, the body came into memory and the client waited for ever."""
    replicas = FakeReplicas()
    app = Ingress(replicas, KeyRing(write_keys(tmp_path)) if has_keys else None, Settings(**NAMED), BASE)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        with caplog.at_level(logging.INFO, "server.request"):
            reply = await http.post(path, content=never(), headers={"Authorization": sent} if sent else {})
    assert reply.status_code == reply.json()["error"]["code"] == status
    assert (replicas.asked, replicas.bodies_of_all) == ([], [])
    assert [record.getMessage() for record in caplog.records if record.name == "server.request"] == [f"POST {path} {status}"]
    assert "guessed" not in caplog.text


@pytest.mark.parametrize("ring", ["acme", None])
async def test_a_client_that_is_no_admin_is_refused_in_the_words_of_one_server(
    ring: str | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    keys = write_keys(tmp_path) if ring else None
    service = make_service(tokenizer, keys)
    caller = Caller(tenant="acme", key_id="acme-1") if keys else Caller()
    with pytest.raises(ForbiddenError) as refused:
        require_admin(caller, service)
    app = Ingress(FakeReplicas(), KeyRing(keys) if keys else None, Settings(**NAMED), BASE)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        reply = await http.delete("/adapters/math", headers=bearer(ACME) if keys else {})
    handler = await on_table_error(cast("Request", None), refused.value)
    assert (reply.status_code, reply.json()) == (handler.status_code, json.loads(bytes(handler.body)))


@pytest.mark.parametrize("is_open", [True, False])
async def test_metrics_are_open_under_the_same_setting_as_on_one_server(is_open: bool, tmp_path: Path) -> None:
    app = Ingress(FakeReplicas(), KeyRing(write_keys(tmp_path)), Settings(open_metrics=is_open), BASE)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        assert (await http.get("/metrics")).status_code == (200 if is_open else 401)
        assert (await http.get("/adapters")).status_code == 401
        assert (await http.get("/ready")).status_code == 200


async def test_a_key_goes_on_with_its_request(tmp_path: Path) -> None:
    app = Ingress(FakeReplicas(), KeyRing(write_keys(tmp_path)), Settings(), BASE)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        reply = await http.post("/generate", json={}, headers={"Authorization": f"Bearer {ACME}"})
    assert reply.json()["authorization"] == [f"Bearer {ACME}"]


async def test_no_more_adapters_are_received_at_once_than_by_one_server(tmp_path: Path) -> None:
    replicas, may_end, statuses = FakeReplicas(), anyio.Event(), list[int]()
    app = Ingress(replicas, KeyRing(write_keys(tmp_path)), Settings(), BASE)

    async def slow() -> AsyncIterator[bytes]:
        await may_end.wait()
        yield b"files"

    async def publish() -> None:
        statuses.append((await http.post("/adapters", content=slow())).status_code)

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress", headers=bearer(ADMIN)) as http:
        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as group:
                for _ in range(MAX_RECEIVED):
                    group.start_soon(publish)
                await anyio.wait_all_tasks_blocked()
                refused = await http.post("/adapters", content=b"files")
                assert (await http.post("/adapters/math/load")).status_code == 200
                may_end.set()
        assert (await http.post("/adapters", content=b"files")).status_code == 200
    assert statuses == [200] * MAX_RECEIVED
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["type"] == "RateLimitError"
    assert refused.json()["error"]["message"] == f"{MAX_RECEIVED} adapters are being received, which is the limit; try again"
    assert replicas.bodies_of_all == [b"", *[b"files"] * (MAX_RECEIVED + 1)]


async def test_an_unknown_key_is_refused_before_a_body_that_is_too_long(tmp_path: Path) -> None:
    app = Ingress(FakeReplicas(), KeyRing(write_keys(tmp_path)), Settings(max_body_bytes=1024), BASE)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        reply = await http.post("/generate", content=b"x" * 2048, headers=bearer("guessed"))
    assert reply.status_code == 401


async def test_a_websocket_is_refused_as_by_one_server() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/generate", "headers": []}
    await Ingress(FakeReplicas(), None, Settings(), BASE)(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/adapters", 200), ("POST", "/generate", 413), ("POST", "/adapters/math/load", 503), ("GET", "/v1/models", 200)],
)
async def test_a_page_of_another_origin_sees_the_ingress_s_own_answers(
    method: str, path: str, status: int, tmp_path: Path
) -> None:
    """Regression: a browser hid such answers from the page, because only answers of replicas had CORS headers."""
    origin, is_lost = "https://chat.example", status == 503
    replicas = FakeReplicas(statuses={} if is_lost else {"a": 200}, bodies={"a": b'{"adapters":[]}'})
    async with client(replicas, tmp_path, cors_origins=[origin], max_body_bytes=1024) as http:
        body = b"x" * 2048 if status == 413 else b""
        reply = await http.request(method, path, headers={"Origin": origin}, content=body)
        http.headers.pop("authorization")
        asked = await http.options(path, headers={"Origin": origin, "Access-Control-Request-Method": method})
        unknown = await http.request(method, path, headers={"Origin": origin})
    assert (reply.status_code, unknown.status_code) == (status, 401)
    assert unknown.headers["access-control-allow-origin"] == origin
    assert reply.headers.get_list("access-control-allow-origin") == [origin]
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, origin)
    assert "DELETE" in asked.headers["access-control-allow-methods"]


async def test_without_origins_the_ingress_sends_no_cors_headers() -> None:
    async with client(FakeReplicas(statuses={})) as http:
        reply = await http.get("/adapters", headers={"Origin": "https://chat.example"})
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("name", ["page.example", "page.example:8000"])
async def test_another_host_name_is_refused_as_by_one_server(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    replicas = FakeReplicas()
    async with client(replicas) as http:
        for method, path in (("POST", "/generate"), ("GET", "/adapters"), ("GET", "/metrics")):
            reply = await http.request(method, path, headers={"Host": name})
            assert reply.status_code == 421
            assert reply.headers["connection"] == "close"
            assert reply.json()["error"]["message"].startswith(f"Host is {name!r}, expected localhost, an IP address, or ")
        assert replicas.asked == []
        assert (await http.get("/generate", headers={"Host": "127.0.0.1:8000"})).status_code == 200
    assert [record.getMessage() for record in caplog.records][:1] == ["POST /generate 421"]


async def test_with_keys_an_ingress_accepts_any_host_name(tmp_path: Path) -> None:
    async with client(FakeReplicas(), admin=tmp_path) as http:
        assert (await http.get("/generate", headers={"Host": "page.example"})).status_code == 200
