"""Refusals over a real socket: bodies, paths and methods that are wrong hurt no other client."""

import gzip
import json
from collections.abc import Iterator
from typing import Any
from unittest.mock import ANY

import pytest

from tests.server.live import MAX_BODY_BYTES, Live
from tests.server.replies import MESSAGES, refusal


def test_an_unknown_adapter_is_404_with_near_names(live: Live) -> None:
    reply = live.client.post("/generate", json={"prompt": "x", "adapter": ["math", "safty"]})
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert error["message"] == "there is no adapter 'safty': did you mean 'safety'?"
    assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "adapter", 404)


@pytest.mark.parametrize(
    ("query", "param", "message"),
    [
        ("/compare?names=math&names=safety", "names", "is given 2 times, expected once"),
        ("/compare?names=math,safety&name=x", "name", "unknown field: did you mean 'names'?"),
        ("?bogus=1", "bogus", "unknown field: expected after, limit, prefix"),
    ],
)
def test_a_query_that_is_not_as_described_is_refused(live: Live, query: str, param: str, message: str) -> None:
    error = refusal(live.client.get(f"/adapters{query}"), 400)
    assert (error["param"], error["message"]) == (param, f"{param}: {message}")


def bad(name: str, body: object, field: str | None, *parts: str) -> Any:
    """Return a bad body, the `param` of its refusal, and the parts that the refusal's message must have."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return pytest.param(content, field, parts, id=name)


BAD = [
    bad("an unknown field", {"prompt": "x", "max_token": 3}, "max_token", "max_token", "unknown field"),
    bad("an unknown field that is no word", {"prompt": "x", "max-tokens": 3}, ANY, "max-tokens", "unknown field"),
    bad("an unknown field that is a type's name", {"prompt": "x", "list": 3}, ANY, "list", "unknown field"),
    bad("prompt is a number", {"prompt": 3}, "prompt", "prompt: expected text, or a list of token ids, found 3"),
    bad("prompt is a list of texts", {"prompt": ["a"]}, "prompt.0", "valid integer", "found 'a'"),
    bad("prompt and messages", {"prompt": "x", "messages": MESSAGES}, None, "'prompt'", "'messages'", "found both"),
    bad("neither prompt nor messages", {"max_tokens": 3}, None, "'prompt'", "'messages'", "found neither"),
    bad("an empty object", {}, None, "'prompt'", "'messages'"),
    bad("an empty prompt", {"prompt": ""}, "prompt", "is empty"),
    bad("no messages", {"messages": []}, "messages", "at least 1"),
    bad("a message without content", {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    bad("an unknown role", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system'", "found 'robot'"),
    bad("an unknown field in a message", {"messages": [{"role": "user", "content": "x", "n": 1}]}, "messages.0.n", "unknown"),
    bad("a template for a prompt", {"prompt": "x", "template": "chat"}, None, "'template'"),
    bad("an unknown template", {"messages": MESSAGES, "template": "poem"}, "template", "found 'poem'"),
    bad("no common template", {"messages": MESSAGES, "adapter": ["math", "intent"]}, "template", "no common template"),
    bad("adapter is a number", {"prompt": "x", "adapter": 7}, "adapter", "found 7"),
    bad("an adapter twice", {"prompt": "x", "adapter": ["math", "math"]}, "adapter", "'math' twice"),
    bad("few weights", {"prompt": "x", "adapter": ["math", "safety"], "weights": [1]}, "weights", "has 1 weights, expected 2"),
    bad("weights alone", {"prompt": "x", "weights": [1]}, None, "'weights' needs 'adapter'"),
    bad("a weight is NaN", b'{"prompt": "x", "adapter": "math", "weights": [NaN]}', None, "is not JSON", "NaN"),
    bad("a weight is infinite", b'{"prompt": "x", "adapter": "math", "weights": [1e999]}', "weights.0", "found inf"),
    bad("a weight is huge", {"prompt": "x", "adapter": "math", "weights": [17]}, "weights.0", "16", "found 17"),
    bad("a weight is text", {"prompt": "x", "adapter": "math", "weights": ["1"]}, "weights.0", "found '1'"),
    bad("huge max_tokens", {"prompt": "x", "max_tokens": 10**9}, "max_tokens", "context of 4096", "at most 4095"),
    bad("negative max_tokens", {"prompt": "x", "max_tokens": -1}, "max_tokens", "0", "found -1"),
    bad("max_tokens is a fraction", {"prompt": "x", "max_tokens": 2.5}, "max_tokens", "found 2.5"),
    bad("max_tokens is true", {"prompt": "x", "max_tokens": True}, "max_tokens", "found True"),
    bad("max_tokens is a digit too long", b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", None),
    bad("max_tokens of nothing", {"prompt": "x", "max_tokens": 0}, "max_tokens", "echo"),
    bad("a prompt beyond the context", {"prompt": "x" * 4096}, "prompt", "has 4096 tokens", "4096"),
    bad("a negative temperature", {"prompt": "x", "temperature": -0.1}, "temperature", "found -0.1"),
    bad("a temperature of NaN", b'{"prompt": "x", "temperature": NaN}', None, "is not JSON", "NaN"),
    bad("a negative seed", {"prompt": "x", "seed": -1}, "seed", "found -1"),
    bad("a huge seed", {"prompt": "x", "seed": 2**63}, "seed", f"found {2**63}"),
    bad("an empty stop", {"prompt": "x", "stop": ""}, "stop", "empty"),
    bad("an empty stop in a list", {"prompt": "x", "stop": ["a", ""]}, "stop.1", "stop.1: is empty"),
    bad("many stops", {"prompt": "x", "stop": ["a"] * 17}, "stop", "16"),
    bad("many logprobs", {"prompt": "x", "logprobs": 21}, "logprobs", "20", "found 21"),
    bad("echo is text", {"prompt": "x", "echo": "yes"}, "echo", "found 'yes'"),
    bad("stream is a number", {"prompt": "x", "stream": 1}, "stream", "found 1"),
    bad("two faults", {"prompt": "x", "seed": -1, "logprobs": 50}, "seed", "seed: ", "; logprobs: "),
    bad("not JSON", b"prompt=x", None, "not JSON"),
    bad("half of JSON", b'{"prompt": "x"', None, "not JSON"),
    bad("an array", [{"prompt": "x"}], None, "expected an object"),
    bad("null", b"null", None),
    bad("a string", b'"prompt"', None, "expected an object"),
    bad("no body", b"", None, "required"),
    bad("half a surrogate pair in the prompt", b'{"prompt": "ab\\ud800"}', "prompt", "surrogate", "character 2"),
    bad("half a pair in the adapter", b'{"prompt": "x", "adapter": "\\udfff"}', "adapter", "surrogate"),
    bad(
        "half a pair in a list of adapters",
        b'{"prompt": "x", "adapter": ["math", "\\udfff"]}',
        "adapter.1",
        "adapter.1: ",
        "surrogate",
    ),
    bad("half a pair in a stop string", b'{"prompt": "x", "stop": "\\ud83d"}', "stop", "surrogate"),
    bad("half a pair in a message", b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "messages.0.content", "surrogate"),
    bad("half a pair in a field's name", b'{"prompt": "x", "\\ud800": 1}', ANY, "\\ud800"),
    bad("half a pair in a role", b'{"messages": [{"role": "\\ud800", "content": "x"}]}', "messages.0.role", "\\ud800"),
    bad("no UTF-8", b'{"prompt": "\xff\xfe"}', None),
    bad("a prompt of many brackets", b'{"prompt": ' + b"[" * 7000 + b"]" * 7000 + b"}", None),
    bad("many brackets", b"[" * 7000 + b"]" * 7000, None),
]


def assert_answers(live: Live) -> None:
    assert live.client.get("/ready").status_code == 200
    assert len(live.generate(prompt="x", max_tokens=1)["text"]) == 1


@pytest.mark.parametrize(("content", "field", "parts"), BAD)
def test_a_bad_body_is_refused_and_hurts_nobody(live: Live, content: bytes, field: str | None, parts: tuple[str, ...]) -> None:
    reply = live.client.post("/generate", content=content, headers={"content-type": "application/json"})
    error = refusal(reply, 400)
    assert error["param"] == field
    for part in parts:
        assert part in error["message"]
    assert_answers(live)


def test_brackets_of_any_depth_are_refused(live: Live) -> None:
    """Try many depths: some bodies can be parsed, some cannot, and some can be parsed but not printed."""
    for depth in range(40, 1100, 20):
        content = b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"
        reply = live.client.post("/generate", content=content, headers={"content-type": "application/json"})
        refusal(reply, 400)
    assert_answers(live)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_without_a_json_content_type_is_refused(live: Live, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    refusal(live.client.post("/generate", content=b'{"prompt": "x"}', headers=headers), 400)
    assert_answers(live)


def test_a_body_too_long_is_413_by_its_header(live: Live) -> None:
    reply = live.client.post("/generate", json={"prompt": "x" * MAX_BODY_BYTES})
    error = refusal(reply, 413)
    assert str(MAX_BODY_BYTES) in error["message"]
    assert_answers(live)


def test_a_body_that_grows_too_long_is_413(live: Live) -> None:
    """Send the body in chunks, which do not announce its length."""

    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(8):
            yield b"x" * (MAX_BODY_BYTES // 4)
        yield b'"}'

    reply = live.client.post("/generate", content=chunks(), headers={"content-type": "application/json"})
    error = refusal(reply, 413)
    assert str(MAX_BODY_BYTES) in error["message"]
    assert_answers(live)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_compressed_body_is_refused_by_the_header_s_name(live: Live, path: str) -> None:
    """Regression: the body was read as if it were not compressed."""
    reply = live.client.post(path, content=gzip.compress(b'{"prompt": "x"}'), headers={"content-encoding": "gzip"})
    assert refusal(reply, 400)["message"] == "Content-Encoding is 'gzip', expected identity or none"
    assert reply.headers["connection"] == "close"
    assert_answers(live)


@pytest.mark.parametrize("headers", [{"Content-Encoding": "identity"}, {"Content-Encoding": "Identity"}])
def test_a_body_with_the_identity_coding_is_read(live: Live, headers: dict[str, str]) -> None:
    assert live.client.post("/generate", json={"prompt": "x", "max_tokens": 2}, headers=headers).status_code == 200


def test_a_body_in_chunks_is_read(live: Live) -> None:
    content = iter([b'{"prompt": "x",', b' "max_tokens": 2}'])
    reply = live.client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert len(reply.json()["text"]) == 2


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/generate"), ("PUT", "/generate"), ("PUT", "/adapters"), ("DELETE", "/health")]
)
def test_a_wrong_method_is_405(live: Live, method: str, path: str) -> None:
    refusal(live.client.request(method, path), 405)
    assert_answers(live)


def test_a_405_names_the_allowed_methods(live: Live) -> None:
    """Check RFC 9110, section 15.5.6: a 405 must name the allowed methods."""
    for path, allowed in (
        ("/generate", "POST"),
        ("/adapters", "GET, POST"),
        ("/adapters/math", "GET, DELETE"),
        ("/", "GET, HEAD"),
    ):
        reply = live.client.patch(path)
        assert reply.headers.get("allow") == allowed
        assert reply.json()["error"]["message"] == f"the method is PATCH, expected {allowed}"


@pytest.mark.parametrize("path", ["/v1", "/v2/generate", "/adapters/math/x", "/adapters/..%2f..%2fetc", "/%ff"])
def test_an_unknown_path_is_404(live: Live, path: str) -> None:
    error = refusal(live.client.post(path, json={"prompt": "x"}), 404)
    assert error["type"] == "NotFoundError"
    assert_answers(live)
