"""Host names of a server without keys: only its own, so no web page can point its name at this machine and read answers."""

import json
import logging
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from server.access.hosts import AllowedHosts
from server.settings import Settings
from tests.server.fake_service import served
from tests.server.keyed import write_keys
from tests.server.live import HOST, LIMIT_S, Live
from tests.server.replies import refusal
from tests.server.rig import FakeEngine

ALLOWED = ["server", "*.example.org", "Upper.Example."]
PAGE = "page.example"
"""The name of somebody's web page."""


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "10.0.0.7:8000", "0.0.0.0:1", "[::1]", "[2001:db8::1]:8000", "[fe80::1%eth0]"),
        *("localhost", "LOCALHOST:8000", "localhost.", "lori.localhost:8000"),
        *("server", "server:8000", "a.example.org", "a.b.example.org:8000", "upper.example", "UPPER.example.:1"),
        "",
    ],
)
def test_own_names_and_addresses_pass(host: str) -> None:
    assert AllowedHosts(ALLOWED).includes(host)


@pytest.mark.parametrize(
    "host",
    [
        *("page.example", "page.example:8000", "localhost.page.example", "127.0.0.1.page.example", "server.page.example"),
        *("notlocalhost", "example.org", "xexample.org", "servers", "::1", "[::1", "[::1]x", "[page.example]", "[127.0.0.1]"),
        *("server:80:80", "server:x", "a@server", "127.1", "2130706433", "0x7f.1", "127.0.0.1/", ":8000", " ", "sërver", "*"),
    ],
)
def test_other_names_do_not_pass(host: str) -> None:
    assert not AllowedHosts(ALLOWED).includes(host)
    assert AllowedHosts(["*"]).includes(host)


def test_the_name_that_the_server_listens_on_passes() -> None:
    hosts = AllowedHosts.from_settings(Settings(host="box.lan", allow_host=["other.lan"]))
    assert [hosts.includes(name) for name in ("box.lan:8000", "other.lan", "page.example")] == [True, True, False]


@pytest.mark.parametrize(("given", "expected"), [("server", ["server"]), ("a.b, *.c", ["a.b", "*.c"]), ("*", ["*"])])
def test_names_are_split_at_commas(given: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(_cli_parse_args=["--allow-host", given]).allow_host == expected
    monkeypatch.setenv("LORI_ALLOW_HOST", given)
    assert Settings().allow_host == expected


@pytest.mark.parametrize("given", ["server:8000", "http://server", "a.*", "*server", "a,,b", "a/b"])
def test_a_setting_that_is_no_host_name_is_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="allow_host"):
        Settings(_cli_parse_args=["--allow-host", given])


def exchange(live: Live, head: str) -> tuple[bytes, bytes]:
    """Send a request's headers. Return the headers and body of the answer, which lasts until the connection ends."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=LIMIT_S) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    start, _, body = answer.partition(b"\r\n\r\n")
    return start, body


def test_another_name_is_refused_before_the_body_is_read(live: Live) -> None:
    """Expect an answer though no body is sent, the end of the connection, and a line in the log."""
    head, body = exchange(live, f"POST /generate HTTP/1.1\r\nHost: {PAGE}:{live.port}\r\nContent-Length: 100\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 421 Misdirected Request\r\n")
    assert b"\r\nconnection: close" in head.lower()
    error = json.loads(body)["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", None, 421)
    assert error["message"].startswith(f"Host is '{PAGE}:{live.port}', expected localhost, an IP address, or a name")
    assert "--allow-host" in error["message"]
    assert "POST none 421" in live.log.read_text()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"GET /health HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n", 200),
        ("GET /health HTTP/1.1\r\nHost: LocalHost:1\r\nConnection: close\r\n\r\n", 200),
        ("GET /health HTTP/1.0\r\n\r\n", 200),
        (f"GET /health HTTP/1.0\r\nHost: {PAGE}\r\n\r\n", 421),
        (f"GET /ready HTTP/1.1\r\nHost: {PAGE}\r\n\r\n", 421),
        (f"GET /metrics HTTP/1.1\r\nHost: {PAGE}\r\n\r\n", 421),
        (f"GET /nowhere HTTP/1.1\r\nHost: {PAGE}\r\n\r\n", 421),
        (f"OPTIONS * HTTP/1.1\r\nHost: {PAGE}\r\n\r\n", 421),
        (f"GET http://{PAGE}/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 421),
        (f"GET HTTP://{PAGE}:80/health?x HTTP/1.1\r\nHost: localhost\r\n\r\n", 421),
        (f"GET http://localhost/health HTTP/1.1\r\nHost: {PAGE}\r\nConnection: close\r\n\r\n", 200),
        (f"GET http://[::1]:1/health HTTP/1.1\r\nHost: {PAGE}\r\nConnection: close\r\n\r\n", 200),
    ],
)
def test_the_host_name_is_checked_for_every_request(live: Live, head: str, status: int) -> None:
    answer, _ = exchange(live, head)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_a_page_of_an_allowed_origin_can_read_the_refusal(tokenizer: PreTrainedTokenizerFast) -> None:
    origin = "https://chat.example"
    with served(tokenizer, FakeEngine(), cors_origins=[origin]) as (client, _):
        reply = client.get("/adapters", headers={"Host": PAGE, "Origin": origin})
        refusal(reply, 421)
        assert reply.headers["access-control-allow-origin"] == origin


def test_with_keys_any_host_name_passes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with served(tokenizer, FakeEngine(), write_keys(tmp_path)) as (client, _):
        assert client.get("/health", headers={"Host": PAGE}).status_code == 200
        refusal(client.get("/adapters", headers={"Host": PAGE}), 401)


def test_a_refusal_is_logged_and_counted(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with served(tokenizer, FakeEngine()) as (client, _):
        refusal(client.get("/adapters", headers={"Host": PAGE}), 421)
        assert 'lori:http_requests_total{route="none",status="421"} 1.0' in client.get("/metrics").text
    assert "GET none 421" in [record.getMessage() for record in caplog.records]
