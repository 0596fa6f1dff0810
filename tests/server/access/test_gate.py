"""Authentication over a real socket: keys, roles, open routes, browsers of other origins."""

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI
from starlette.types import Message, Scope
from transformers import PreTrainedTokenizerFast

from server.access.caller import Caller
from server.access.gate import Gate, client_of
from server.app import create_app
from server.routes.dependencies import CallerOf, require_admin
from server.routes.error_replies import add_error_handlers
from server.service.service import Service
from tests.server import live
from tests.server.keyed import ACME, ADMIN, MONITOR, OTHER, bearer, make_service, served, write_keys
from tests.server.replies import refusal

KEYS = {"acme": ACME, "admin": ADMIN, "monitor": MONITOR}


@pytest.fixture(scope="module")
def service(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return make_service(tokenizer, write_keys(tmp_path_factory.mktemp("keys")))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with served(service) as client:
        yield client


def create_probed_app(service: Service) -> FastAPI:
    """Return the app with two more routes, which return the caller."""
    app = create_app(service)

    @app.get("/caller")
    async def show_caller(caller: CallerOf) -> tuple[str, str]:
        return caller.tenant, caller.key_id

    @app.post("/change")
    async def change(caller: Annotated[Caller, Depends(require_admin)]) -> str:
        return caller.key_id

    add_error_handlers(app)
    return app


@pytest.fixture(scope="module")
def probed(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client of a server with keys and the routes of `create_probed_app`."""
    service = make_service(tokenizer, write_keys(tmp_path_factory.mktemp("keys")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "create_app", create_probed_app)
        with served(service) as client:
            yield client


@pytest.mark.parametrize(
    "path", ["/adapters", "/metrics", "/generate", "/nowhere", "/health/", "/staticx", "/HEALTH", "//health"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_without_a_key_every_other_route_is_refused(client: httpx.Client, method: str, path: str) -> None:
    reply = client.request(method, client.base_url.copy_with(path=path))
    error = refusal(reply, 401)
    assert error["type"] == "AuthenticationError"
    assert error["message"] == "no key was sent: send a key with the header 'Authorization: Bearer KEY'"
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready", "/version", "/docs", "/openapi.json"])
def test_open_routes_need_no_key_and_ignore_a_wrong_one(client: httpx.Client, path: str) -> None:
    for headers in ({}, bearer("wrong"), {"Authorization": "Basic eDp5"}):
        assert client.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/static/../adapters", "/static/%2e%2e/adapters", "/static/..%2fadapters", "/static//adapters"])
def test_an_open_path_leads_to_no_other_route(client: httpx.Client, path: str) -> None:
    connection = HTTPConnection(client.base_url.host, client.base_url.port or 0)  # sends the path as it is
    with closing(connection):
        connection.request("GET", path)
        assert connection.getresponse().status == 404


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(f"Basic {ACME}", id="another scheme"),
        pytest.param(ACME, id="no scheme"),
        pytest.param("Bearer", id="no key"),
        pytest.param(f"Bearer{ACME}", id="no space"),
        pytest.param("", id="empty"),
    ],
)
def test_a_header_without_a_key_is_reported_as_such(client: httpx.Client, header: str) -> None:
    error = refusal(client.get("/adapters", headers={"Authorization": header}), 401)
    assert error["message"].startswith("the Authorization header is no key's: send a key")
    assert ACME not in error["message"]


def test_two_keys_are_refused(client: httpx.Client) -> None:
    for keys in ((ACME, ADMIN), (ADMIN, ACME), (ACME, ACME)):
        reply = client.get("/adapters", headers=[("Authorization", f"Bearer {key}") for key in keys])
        assert "is no key's" in refusal(reply, 401)["message"]


@pytest.mark.parametrize("key", ["wrong", f"{ACME}x", ACME[:-1], ACME.upper(), "acme-1", f"{ACME} {ACME}", "ä"])
def test_an_unknown_key_is_refused_and_not_quoted(client: httpx.Client, key: str) -> None:
    error = refusal(client.get("/adapters", headers={b"Authorization": f"Bearer {key}".encode()}), 401)
    assert error["message"] == "the key is not known"


@pytest.mark.parametrize("header", [f"Bearer {ACME}", f"bearer {ACME}", f"BEARER   {ACME}"])
def test_a_known_key_is_accepted(client: httpx.Client, header: str) -> None:
    assert client.get("/adapters", headers={"Authorization": header}).status_code == 200
    assert client.post("/generate", headers={"Authorization": header}, json={"prompt": "x"}).json()["text"] == "xxx"


def test_routes_get_the_caller(probed: httpx.Client) -> None:
    callers = {name: probed.get("/caller", headers=bearer(key)).json() for name, key in KEYS.items() if name != "monitor"}
    assert callers == {"acme": ["acme", "acme-1"], "admin": ["", "admin-1"]}


def test_admins_alone_change_things(probed: httpx.Client) -> None:
    assert probed.post("/change", headers=bearer(ADMIN)).json() == "admin-1"
    error = refusal(probed.post("/change", headers=bearer(ACME)), 403)
    assert error["type"] == "PermissionDeniedError"
    assert error["message"] == "this route needs a key of the role 'admin', and 'acme-1' is one of tenant 'acme'"


def test_metrics_are_for_monitors_and_admins(client: httpx.Client) -> None:
    for key in (MONITOR, ADMIN):
        reply = client.get("/metrics", headers=bearer(key))
        assert reply.status_code == 200
        assert "vllm:request_success" in reply.text
    error = refusal(client.get("/metrics", headers=bearer(ACME)), 403)
    assert error["message"] == "this route needs a key of the role 'monitor' or 'admin', and 'acme-1' is one of tenant 'acme'"


@pytest.mark.parametrize("path", ["/adapters", "/generate", "/nowhere", "/metrics/"])
def test_a_monitor_reads_nothing_else(client: httpx.Client, path: str) -> None:
    error = refusal(client.post(path, headers=bearer(MONITOR), json={"prompt": "x"}), 403)
    assert error["message"] == "the key 'monitor-1' is of the role 'monitor', which reads /metrics alone"


def test_metrics_may_be_read_without_a_key_with_open_metrics(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, client: httpx.Client
) -> None:
    """Serve gateways, which scrape metrics without a key."""
    refusal(client.get("/metrics"), 401)
    with served(make_service(tokenizer, write_keys(tmp_path), open_metrics=True)) as open_client:
        assert open_client.get("/metrics").status_code == open_client.get("/metrics", headers=bearer(MONITOR)).status_code == 200
        refusal(open_client.get("/metrics", headers=bearer("lori_unknown")), 401)
        refusal(open_client.get("/metrics", headers=bearer(ACME)), 403)
        for path in ("/adapters", "/v1/models"):
            refusal(open_client.get(path), 401)
        refusal(open_client.post("/generate", json={"prompt": "x"}), 401)


@pytest.mark.slow
def test_without_a_key_file_all_may_ask_and_nobody_may_change(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "create_app", create_probed_app)
    with served(make_service(tokenizer)) as client:
        for headers in ({}, bearer("whatever")):
            assert client.get("/caller", headers=headers).json() == ["", ""]
            assert client.get("/metrics", headers=headers).status_code == 200
            error = refusal(client.post("/change", headers=headers), 403)
        assert "and the server has no keys: make one with `python -m server.keys keys.toml --role admin`" in error["message"]
        assert "start the server with --keys keys.toml" in error["message"]
        assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("Content-Length: 100000\r\nExpect: 100-continue\r\n\r\n", id="a body that waits for leave"),
        pytest.param('Content-Length: 100000\r\n\r\n{"prompt": "', id="part of a body"),
        pytest.param("Transfer-Encoding: chunked\r\n\r\n", id="chunks that do not come"),
    ],
)
def test_a_stranger_is_answered_before_the_body_arrives(client: httpx.Client, rest: str) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=live.LIMIT_S) as stranger:
        stranger.sendall(f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{rest}".encode())
        received = b""
        while b'"code":401' not in received:
            received += stranger.recv(4096)
        assert received.startswith(b"HTTP/1.1 401 Unauthorized\r\n"), "and not 100 Continue"


def test_a_stranger_with_a_long_body_gets_a_401(client: httpx.Client) -> None:
    for _ in range(3):
        refusal(client.post("/generate", content=b"x" * 10_000_000), 401)


def test_nothing_of_a_stranger_s_request_is_read(service: Service) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    async def app(*_: object) -> None:
        raise AssertionError("the request reached the app")

    def ask(kind: str) -> None:
        scope: Scope = {"type": kind, "path": "/generate", "headers": [(b"authorization", b"Bearer wrong")]}
        asyncio.run(Gate(app, service.keys)(scope, receive, send))

    ask("http")
    assert sent[0]["status"] == 401
    sent.clear()
    ask("websocket")
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_the_app_behind_the_gate_does_not_see_the_key(service: Service) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, *_: object) -> None:
        seen.append(scope)

    async def never(*_: object) -> Message:
        raise AssertionError

    scope: Scope = {
        "type": "http",
        "path": "/adapters",
        "headers": [(b"a", b"b"), (b"authorization", f"Bearer {ACME}".encode())],
        "state": {"service": service},
    }
    asyncio.run(Gate(app, service.keys)(scope, never, never))
    assert seen[0]["headers"] == [(b"a", b"b")]
    assert seen[0]["state"]["service"] is service
    assert seen[0]["state"]["caller"].key_id == "acme-1"
    assert "caller" not in scope["state"]


def test_no_key_reaches_the_log(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "lori_very-secret"
    for key in (secret, ACME, ADMIN, MONITOR):
        for path in ("/adapters", "/generate", "/metrics"):
            client.post(path, headers=bearer(key), json={"prompt": ""})
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert sum(record.name == "server.request" for record in ours) == 12, "each request is logged"
    assert not [record for record in ours if any(key in record.getMessage() for key in (secret, *KEYS.values()))]


def test_the_description_shows_which_routes_need_a_key(client: httpx.Client) -> None:
    for _ in range(2):
        description = client.get("/openapi.json").json()
    assert description["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    operations = {path: operation for path, methods in description["paths"].items() for operation in methods.values()}
    assert {path for path, operation in operations.items() if "security" not in operation} == {
        "/health",
        "/ping",
        "/ready",
        "/version",
    }
    for path in ("/generate", "/adapters", "/metrics"):
        assert operations[path]["security"] == [{"key": []}]
        for status in ("401", "403"):
            content = operations[path]["responses"][status]["content"]
            assert content["application/json"]["schema"]["$ref"].endswith("/ErrorReply")


PAGE = {"Origin": "https://page.example"}
PREFLIGHT = PAGE | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}


def test_browsers_of_other_origins_get_no_cors_headers_by_default(client: httpx.Client) -> None:
    for reply in (
        client.options("/generate", headers=PREFLIGHT),
        client.get("/health", headers=PAGE),
        client.get("/adapters", headers=PAGE | bearer(ACME)),
    ):
        assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", ["https://page.example", "*"])
def test_origins_that_are_named_may_ask_with_a_key(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, origin: str) -> None:
    with served(make_service(tokenizer, write_keys(tmp_path), cors_origins=[origin])) as client:
        allowed = client.options("/generate", headers=PREFLIGHT)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        replies = [client.get("/adapters", headers=PAGE | headers) for headers in (bearer(OTHER), {})]
        assert [reply.status_code for reply in replies] == [200, 401]
        for reply in [allowed, *replies]:
            assert reply.headers["access-control-allow-origin"] == origin
            assert "access-control-allow-credentials" not in reply.headers
        stranger = {"Origin": "https://other.example"}
        refused = client.options("/generate", headers=PREFLIGHT | stranger)
        assert (refused.status_code == 200) is (origin == "*")
        if origin != "*":
            assert "access-control-allow-origin" not in client.get("/adapters", headers=stranger | bearer(OTHER)).headers


@pytest.mark.parametrize(
    ("scope", "client"),
    [
        ({"state": {"caller": Caller(tenant="acme")}, "client": ("10.0.0.1", 5)}, "tenant acme"),
        ({"state": {"caller": Caller(is_admin=True)}, "client": ("10.0.0.1", 5)}, "address 10.0.0.1"),
        ({"client": ("10.0.0.1", 6)}, "address 10.0.0.1"),
        ({"client": None}, "address "),
    ],
)
def test_a_body_counts_for_its_tenant_or_its_address(scope: Scope, client: str) -> None:
    assert client_of(scope) == client
