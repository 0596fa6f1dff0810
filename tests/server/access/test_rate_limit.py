"""The rate of a tenant's requests, counted at the gate, over a real socket."""

import asyncio
import logging
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Scope
from transformers import PreTrainedTokenizerFast

from server.access.gate import Gate
from server.access.key_ring import KeyRing
from server.access.limits import RateLimiter
from server.service.service import Service
from tests.server.forked import start_forked
from tests.server.keyed import ACME, ADMIN, OTHER, bearer, make_service, served, write_keys
from tests.server.live import LIMIT_S
from tests.server.replies import refusal
from tests.server.rig import FakeEngine

Asked = tuple[str, str, dict[str, Any], int]
"""A method, a path, what httpx sends with them, and the status of the answer."""
BODY = {"prompt": "x"}
FOR_EVER = 10**9
JSON = {"Content-Type": "application/json"}


class Clock:
    """A clock that stands still until a test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def limited(tokenizer: PreTrainedTokenizerFast, place: Path, limits: str, **settings: Any) -> Service:
    """Return a service with `limits` for the tenant acme."""
    return make_service(tokenizer, write_keys(place, limits), **settings)


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(("POST", "/generate", {"json": BODY}, 200), id="answered"),
        pytest.param(("GET", "/adapters", {}, 200), id="the adapters' list"),
        pytest.param(("GET", "/adapters/compare?names=nobody", {}, 404), id="a comparison"),
        pytest.param(("GET", "/v1/models", {}, 200), id="the models"),
        pytest.param(("GET", "/metrics", {}, 403), id="metrics that it may not read"),
        pytest.param(("POST", "/tokenize", {"json": BODY}, 200), id="a text's tokens"),
        pytest.param(("POST", "/generate", {"content": b"{", "headers": JSON}, 400), id="no JSON"),
        pytest.param(("POST", "/generate", {"json": {"prompt": [1] * 90_000}}, 400), id="a prompt that is too long"),
        pytest.param(("POST", "/generate", {"json": BODY | {"adapter": "nobody"}}, 404), id="an unknown adapter"),
        pytest.param(("POST", "/generate", {"json": BODY, "headers": {"Content-Encoding": "gzip"}}, 400), id="a coding"),
        pytest.param(("POST", "/generate", {"content": b"x" * (1 << 20) + b"x"}, 413), id="a body that is too long"),
        pytest.param(("POST", "/adapters", {"content": b"x"}, 403), id="an upload that it may not send"),
        pytest.param(("DELETE", "/generate", {}, 405), id="a wrong method"),
        pytest.param(("GET", "/nowhere", {}, 404), id="no route"),
    ],
)
def test_every_request_of_a_tenant_counts_whatever_its_answer(
    asked: Asked, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Regression: requests refused for their content, and lists, had no limit, so a tenant could hold up others with them."""
    method, path, content, status = asked
    with served(limited(tokenizer, tmp_path, "requests_per_minute = 2"), ACME) as client:
        for _ in range(2):
            assert client.request(method, path, **content).status_code == status
        reply = client.request(method, path, **content)
        error = refusal(reply, 429)
        assert (error["type"], error["param"]) == ("RateLimitError", None)
        assert error["message"].startswith("tenant 'acme' may send 2 requests a minute, and has sent them; try again in ")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        refusal(client.post("/generate", json=BODY), 429)
        for key in (OTHER, ADMIN):
            assert client.get("/v1/models", headers=bearer(key)).status_code == 200


@pytest.mark.slow
def test_open_routes_do_not_count(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with served(limited(tokenizer, tmp_path, "requests_per_minute = 1"), ACME) as client:
        for path in ("/", "/health", "/ping", "/ready", "/version", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        assert client.post("/generate", json=BODY).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_request_refused_for_the_rate_is_not_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    service, clock = limited(tokenizer, tmp_path, "requests_per_minute = 2"), Clock()
    service.rate = RateLimiter(clock=clock)
    with served(service, ACME) as client:
        for _ in range(2):
            assert client.get("/v1/models").status_code == 200
            clock.now += 20
        for _ in range(10):
            assert refusal(client.get("/v1/models"), 429)["message"].endswith("try again in 20 s")
        clock.now += 20.5
        assert client.get("/v1/models").status_code == 200


def test_a_request_refused_for_answers_under_way_is_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Count the request, because reading its body costs others as much as that of any refused request."""
    service = limited(tokenizer, tmp_path, "max_requests = 1\nrequests_per_minute = 3", engine=FakeEngine(num_steps=FOR_EVER))
    with served(service, ACME) as client, client.stream("POST", "/generate", json=BODY | {"stream": True}) as reply:
        lines = reply.iter_lines()
        assert next(lines) == "event: token"
        for _ in range(2):
            assert "under way" in refusal(client.post("/generate", json=BODY), 429)["message"]
        assert "a minute" in refusal(client.post("/generate", json=BODY), 429)["message"]


def test_each_prompt_of_a_batch_counts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with served(limited(tokenizer, tmp_path, "requests_per_minute = 6"), ACME) as client:

        def complete(num_prompts: int) -> httpx.Response:
            return client.post("/v1/completions", json={"prompt": ["x"] * num_prompts})

        assert complete(3).status_code == 200
        error = refusal(complete(7), 400)  # the refused batch counts as one request
        assert (error["param"], "expected 6 at most" in error["message"]) == ("prompt", True)
        reply = complete(3)  # its two other prompts are too many; refused, it counts as one request
        assert refusal(reply, 429)["message"].startswith("tenant 'acme' may send 6 requests a minute, and has sent them")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert complete(1).status_code == 200
        refusal(complete(1), 429)


def check_answered_before_the_body(client: httpx.Client, rest: str) -> None:
    """Send headers that end with `rest`, and check that the 429 comes without more of the body."""
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=LIMIT_S) as sender:
        sender.sendall(f"{head}{rest}".encode())
        received = b""
        while b'"code":429' not in received:
            part = sender.recv(4096)
            assert part, received
            received += part
        headers = received.partition(b"\r\n\r\n")[0].lower()
        assert headers.startswith(b"http/1.1 429 too many requests\r\n")
        assert b"\r\nconnection: close" in headers
        assert b"\r\nretry-after: " in headers
        while sender.recv(4096):  # until the server has closed the connection
            pass


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("Content-Length: 100000\r\nExpect: 100-continue\r\n\r\n", id="a body that waits for leave"),
        pytest.param("Content-Length: 100000\r\n\r\n", id="a body that does not come"),
        pytest.param('Content-Length: 100000\r\n\r\n{"prompt": "', id="part of a body"),
        pytest.param("Transfer-Encoding: chunked\r\n\r\n", id="chunks that do not come"),
    ],
)
def test_the_refusal_comes_before_the_body(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, rest: str) -> None:
    with served(limited(tokenizer, tmp_path, "requests_per_minute = 1"), ACME) as client:
        assert client.get("/v1/models").status_code == 200
        check_answered_before_the_body(client, rest)


@pytest.mark.slow
def test_a_real_server_answers_before_the_body(writer_model: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path, "requests_per_minute = 2")
    flags = ["--model", str(writer_model), "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.01", "--keys", str(keys)]
    with start_forked(tmp_path / "log", *flags) as live:
        live.client.headers.update(bearer(ACME))
        assert live.client.get("/adapters").status_code == 200
        assert live.client.post("/generate", content=b"{", headers=JSON).status_code == 400
        for _ in range(3):
            check_answered_before_the_body(live.client, "Content-Length: 100000\r\n\r\n")
            refusal(live.client.get("/adapters"), 429)


def test_without_a_body_a_refusal_leaves_the_connection_open(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with served(limited(tokenizer, tmp_path, "requests_per_minute = 1"), ACME) as client:
        assert client.get("/v1/models").status_code == 200
        for headers in ({}, {"Content-Length": "0"}):
            reply = client.get("/v1/models", headers=headers)
            refusal(reply, 429)
            assert "connection" not in reply.headers


def test_the_body_of_a_refused_request_is_not_read(tmp_path: Path) -> None:
    sent: list[Message] = []
    ring, rate = KeyRing(write_keys(tmp_path, "requests_per_minute = 1")), RateLimiter()

    async def receive() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    async def app(*_: object) -> None:
        sent.append({"type": "let in"})

    headers = [(b"authorization", f"Bearer {ACME}".encode()), (b"content-length", b"100")]
    scope: Scope = {"type": "http", "path": "/generate", "headers": headers}
    for _ in range(2):
        asyncio.run(Gate(app, ring, rate)(scope, receive, send))
    assert [message.get("status") for message in sent] == [None, 429, None]


def test_unknown_keys_leave_nothing_behind(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    service = limited(tokenizer, tmp_path, "requests_per_minute = 1")
    with served(service) as client:
        for number in range(50):
            refusal(client.get("/v1/models", headers=bearer(f"lori_guess-{number}")), 401)
            refusal(client.get("/v1/models"), 401)
    assert not service.rate._sent
    assert not service.limiter._under_way


def test_the_log_names_the_tenant_of_a_refused_request(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.request")
    with served(limited(tokenizer, tmp_path, "requests_per_minute = 1"), ACME) as client:
        for _ in range(2):
            client.post("/generate", json=BODY)
    records = [record.__dict__ for record in caplog.records if record.name == "server.request"]
    fields = [(record["status"], record["tenant"], record["key_id"]) for record in records]
    assert fields == [(200, "acme", "acme-1"), (429, "acme", "acme-1")]


def test_behind_an_ingress_nothing_is_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Regression: each replica counted, too, besides the ingresses, so N replicas gave a tenant N times its rate."""
    service = make_service(tokenizer, write_keys(tmp_path, "requests_per_minute = 4"), num_ingresses=2)
    with served(service, ACME) as client:
        for _ in range(5):
            assert client.post("/v1/completions", json={"prompt": ["x", "y"]}).status_code == 200
        error = refusal(client.post("/v1/completions", json={"prompt": ["x", "y", "z"]}), 400)
        assert "expected 2 at most" in error["message"], "no ingress would ever let this batch through"
