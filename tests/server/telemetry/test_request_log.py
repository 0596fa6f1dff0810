"""The log line of each request, and the request id in its reply."""

import json
import logging
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.generate_request import GenerateRequest
from server.engine.request import Request
from server.telemetry.logs import TextFormatter
from tests.server.fake_service import served
from tests.server.forked import start_forked
from tests.server.keyed import ACME, bearer, write_keys
from tests.server.live import Live, wait_until
from tests.server.rig import FakeEngine

HEADER = "x-request-id"
FRESH = re.compile(r"req-[0-9a-f]{24}")
SECRET = "the 3rd of Brumaire"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.name == "server.request"]


def line(caplog: pytest.LogCaptureFixture, request_id: str) -> dict[str, Any]:
    """Wait for the log line of a request and return it. Fail if there are several."""
    wait_until(lambda: any(each["request_id"] == request_id for each in lines(caplog)), "the log line")
    [row] = [each for each in lines(caplog) if each["request_id"] == request_id]
    return row


@pytest.fixture(autouse=True)
def _level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("sent", ["7f3a", "a.b_c~d:e/f+g=h@i-J9", "x" * 128])
def test_an_answer_carries_the_client_s_id(tokenizer: PreTrainedTokenizerFast, sent: str) -> None:
    with served(tokenizer, FakeEngine()) as (client, _):
        reply = client.post("/generate", json={"prompt": "x"}, headers={HEADER: sent})
        assert reply.headers.get_list(HEADER) == [sent]


@pytest.mark.parametrize("sent", [b"", b"x" * 129, b"two words", b'quo"te', b"caf\xc3\xa9", b"semi;colon", b"a,b"])
def test_an_id_that_a_log_cannot_hold_is_replaced(tokenizer: PreTrainedTokenizerFast, sent: bytes) -> None:
    with served(tokenizer, FakeEngine()) as (client, _):
        ids = [client.get("/health", headers=[(HEADER.encode(), sent)]).headers[HEADER] for _ in range(2)]
        assert all(FRESH.fullmatch(each) for each in ids)
        assert ids[0] != ids[1]


class FailingAdmission:
    max_context = 100

    def admit(self, _: GenerateRequest) -> Request:
        raise RuntimeError("a fault of ours")


def test_every_answer_carries_an_id(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    with served(tokenizer, FakeEngine(num_steps=2), max_body_bytes=1024) as (client, service):

        def ask(path: str = "/generate", **more: Any) -> httpx.Response:
            body = {"prompt": "x"} if path == "/generate" else {}
            return client.post(path, json=body | more)

        replies = [ask(), ask(stream=True), ask(no_field=1), ask(prompt="x" * 2000), ask("/nowhere"), ask("/health")]
        service.admission = FailingAdmission()  # type: ignore[assignment]
        replies.append(ask())
        service.is_draining = True
        replies.append(client.get("/ready"))
    assert [each.status_code for each in replies] == [200, 200, 400, 413, 404, 405, 500, 503]
    ids = [each.headers[HEADER] for each in replies]
    assert len(set(ids)) == len(ids)
    assert {each["request_id"] for each in lines(caplog)} >= set(ids)
    assert replies[-2].json()["error"]["message"] == "the server failed; its log says why"
    [failure] = [record for record in caplog.records if record.exc_info]
    assert f"{ids[-2]} failed" in failure.getMessage()
    assert "a fault of ours" in str(failure.exc_info)


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_log_line_of_a_request_has_its_outcome(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, is_stream: bool
) -> None:
    with served(tokenizer, FakeEngine(num_steps=4)) as (client, _):
        reply = client.post("/generate", json={"prompt": "x", "stream": is_stream}, headers={HEADER: "mine"})
        row = line(caplog, "mine")
    assert reply.status_code == 200
    assert (row["method"], row["route"], row["status"], row["client"]) == ("POST", "/generate", 200, "127.0.0.1")
    assert (row["prompt_tokens"], row["completion_tokens"], row["finish_reason"]) == (1, 4, "length")
    assert (row["adapters"], row["weights"]) == ([], [])
    assert 0 < row["first_token_s"] <= row["total_s"]
    assert row["queue_s"] >= 0
    assert not row.keys() & {"disconnected", "unfinished", "prompts", "texts", "tenant", "key_id"}


def test_a_path_without_a_route_is_logged_as_received(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tokenizer, FakeEngine()) as (client, _):
        client.get("/no%0Awhere?key=secret", headers={HEADER: "mine"})
        row = line(caplog, "mine")
    assert (row["route"], row["path"], row["status"]) == ("none", "/no%0Awhere", 404)
    assert "secret" not in str(row)


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        ({"adapter": "nobody"}, {"error_type": "NotFoundError", "error_param": "adapter", "unknown_name": "nobody"}),
        ({"adapter": "n" * 99}, {"error_type": "NotFoundError", "error_param": "adapter", "unknown_name": "n" * 63 + "…"}),
        ({"temperature": -1}, {"error_type": "BadRequestError", "error_param": "temperature"}),
    ],
)
def test_a_refused_request_s_line_says_which_field_is_wrong(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, body: Mapping[str, object], refusal: Mapping[str, str]
) -> None:
    with served(tokenizer, FakeEngine()) as (client, _):
        client.post("/generate", json={"prompt": "x", **body}, headers={HEADER: "mine"})
        row = line(caplog, "mine")
    assert {key: value for key, value in row.items() if key.startswith("error_") or key == "unknown_name"} == refusal


def test_probes_are_logged_only_if_they_fail(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    with served(tokenizer, FakeEngine()) as (client, service):
        for path in ("/health", "/ping", "/ready", "/metrics"):
            assert client.get(path).status_code == 200
        service.is_draining = True
        client.get("/ready", headers={HEADER: "failed"})
        line(caplog, "failed")
    assert [each["request_id"] for each in lines(caplog)] == ["failed"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_log_line_of_a_departed_client_has_its_tokens_so_far(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, is_stream: bool
) -> None:
    engine = FakeEngine(num_steps=10**9)
    body = json.dumps({"prompt": "x", "stream": is_stream}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\n{HEADER}: mine\r\nContent-Type: application/json\r\n"
    with served(tokenizer, engine) as (client, service):
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: max(engine.emitted.values(), default=0) > 5, "some tokens")
            if is_stream:
                assert connection.recv(64)
        row = line(caplog, "mine")
        wait_until(lambda: service.num_requests == 0, "the place to be freed")
    assert row["disconnected"] is True
    assert row["status"] == (200 if is_stream else 499)
    assert row["finish_reason"] == "cancelled"
    assert row["completion_tokens"] > 0
    assert row["prompt_tokens"] == 1


@pytest.mark.parametrize("is_asked", [False, True])
def test_prompts_and_answers_are_logged_only_with_log_prompts(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, is_asked: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    with served(tokenizer, FakeEngine(num_steps=3), log_prompts=is_asked) as (client, _):
        for stream in (False, True):
            client.post("/generate", json={"prompt": SECRET, "stream": stream}, headers={HEADER: f"mine-{stream}"})
            row = line(caplog, f"mine-{stream}")
            assert (row.get("prompts"), row.get("texts")) == (([SECRET], ["xxx"]) if is_asked else (None, None))
        client.post("/generate", json={"prompt": SECRET, "adapter": "nobody"})
        client.post("/generate", json={"prompt": SECRET, "temperature": SECRET})
    assert (SECRET in str([vars(record) for record in caplog.records])) is is_asked


def test_the_log_line_names_the_caller_and_never_the_key(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    with served(tokenizer, FakeEngine(), write_keys(tmp_path)) as (client, _):
        for name, key in (("known", ACME), ("unknown", "no-key-of-ours")):
            reply = client.post("/generate", json={"prompt": "x"}, headers={HEADER: name, **bearer(key)})
            assert reply.headers[HEADER] == name
        known, unknown = line(caplog, "known"), line(caplog, "unknown")
    assert (known["status"], known["route"], known["tenant"], known["key_id"]) == (200, "/generate", "acme", "acme-1")
    assert (unknown["status"], unknown["path"]) == (401, "/generate")
    assert not unknown.keys() & {"tenant", "key_id"}
    text = str([vars(record) for record in caplog.records if not record.name.startswith("http")])
    assert ACME not in text
    assert "no-key-of-ours" not in text


def test_the_text_format_shows_the_extra_fields_of_a_record_on_one_line() -> None:
    record = logging.LogRecord("server.request", logging.INFO, "", 0, "%s %d", ("GET", 200), None)
    record.__dict__ |= {"path": "/a\nINFO forged", "adapters": ["math@1"], "total_s": 0.5, "status": 200, "color_message": "no"}
    assert TextFormatter().format(record) == (
        r"INFO server.request: GET 200 path='/a\nINFO forged' adapters=['math@1'] total_s=0.5"
    )


@pytest.fixture(scope="module")
def json_live(writer_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    flags = ["--model", str(writer_model), "--adapters", str(adapters), "--dtype", "float32", "--threads", "1"]
    with start_forked(tmp_path_factory.mktemp("json") / "log", *flags, "--kv-cache-gib", "0.01", "--log-format", "json") as live:
        yield live


def test_with_json_every_line_is_an_object(json_live: Live) -> None:
    reply = json_live.client.post(
        "/generate",
        json={"prompt": SECRET, "max_tokens": 3, "adapter": ["math", "safety"], "weights": [1, 0.5]},
        headers={HEADER: "mine"},
    )
    wait_until(lambda: '"mine"' in json_live.log.read_text(), "the log line")
    rows = [json.loads(each) for each in json_live.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= each.keys() for each in rows)
    assert any(each["message"].startswith("Uvicorn running on http://") for each in rows)
    assert not any("color_message" in each for each in rows)
    [own_row] = [each for each in rows if each.get("request_id") == "mine"]
    assert own_row["adapters"] == [f"{each['name']}@{each['version']}" for each in reply.json()["adapter"]]
    assert own_row["weights"] == [1, 0.5]
    assert own_row["completion_tokens"] == 3
    assert own_row["generations"] == [reply.json()["id"]]
    assert SECRET not in json_live.log.read_text()
