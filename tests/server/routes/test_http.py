"""A real server in a process of its own, over a real socket: routes, refusals, streams, disconnects, metrics."""

import asyncio
import gzip
import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from typing import Any, cast
from unittest.mock import ANY

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message
from transformers import PreTrainedTokenizerFast

from lori.base_model import BaseModel
from lori.template import encode
from server.engine.adapters.registry import Registry
from server.engine.admission import Admission, GenerateRequest
from server.engine.engine import Engine
from server.engine.request import Request, TextEvent
from server.engine.step import Emit
from server.engine.thread import EngineThread
from server.routes.event_stream import EventStream
from server.schemas.generation import GenerateReply
from server.service.service import Service
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.live import HOST, LIMIT_S, MAX_BODY_BYTES, RUNNING, Live, events, serve_here, wait_until
from tests.server.rig import FakeEngine, greedy

FOX = "The quick brown fox jumps over the lazy dog. "
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 times 7?"}]
FOR_EVER = 4000
"""Tokens with the prompt. They take a tiny model seconds, and half of the server's KV memory."""
USAGE = "vllm:kv_cache_usage_perc"


def lasting(reply: dict[str, Any]) -> dict[str, Any]:
    """Return the part that two replies to one body have in common: without ids, timings and the number of cached tokens."""
    usage = {key: count for key, count in reply["usage"].items() if key != "cached_tokens"}
    return {**reply, "id": None, "timings": None, "usage": usage}


def test_a_prompt_is_continued_as_transformers_does(live: Live, writer: BaseModel) -> None:
    prompt = f"Nobody else asks this. {FOX}"
    reply = live.generate(prompt=prompt, max_tokens=30)
    ids = encode(writer.tokenizer, prompt).ids
    assert reply["text"] == writer.tokenizer.decode(greedy(writer.model, ids, 30))
    assert reply["finish_reason"] == "length"
    total = len(ids) + 30
    assert reply["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 30, "total_tokens": total, "cached_tokens": 0}
    assert reply["adapter"] == []
    assert reply["merge"] is reply["logprobs"] is reply["choices"] is None
    assert set(reply) == GenerateReply.model_fields.keys()


def test_messages_are_answered_with_the_adapters_template(live: Live) -> None:
    chat = "<|system|>Be brief.<|end|><|user|>What is 12 times 7?<|end|><|assistant|>"
    plain = "Be brief.\nWhat is 12 times 7?"
    for adapter, text in (("math", chat), ("intent", plain)):
        reply = live.generate(messages=MESSAGES, adapter=adapter, max_tokens=20)
        assert reply["text"] == live.generate(prompt=text, adapter=adapter, max_tokens=20)["text"]
    forced = live.generate(messages=MESSAGES, adapter="math", template="plain", max_tokens=20)
    assert forced["text"] == live.generate(prompt=plain, adapter="math", max_tokens=20)["text"]


@pytest.mark.parametrize(
    ("model", "template", "written"),
    [(None, None, "chat"), ("math", None, "chat"), ("intent", None, "plain"), ("math+safety", "plain", "plain")],
)
def test_every_route_writes_messages_in_the_same_template_and_names_it(
    live: Live, model: str | None, template: str | None, written: str
) -> None:
    asked = {"messages": MESSAGES, "template": template}
    counted = live.client.post("/tokenize", json={**asked, "model": model}).raise_for_status().json()
    chat = live.client.post("/v1/chat/completions", json={**asked, "model": model, "max_tokens": 2}).raise_for_status().json()
    own = live.generate(**asked, adapter=model.split("+") if model else None, max_tokens=2)
    assert counted["template"] == chat["lori"]["template"] == own["template"] == written
    assert counted["count"] == chat["usage"]["prompt_tokens"] == own["usage"]["prompt_tokens"]
    assert live.generate(prompt=FOX, max_tokens=2)["template"] is None
    text = live.client.post("/tokenize", json={"prompt": FOX, "model": model}).raise_for_status().json()
    assert text["template"] is None


def test_a_name_a_list_and_weights_are_resolved_and_reported(live: Live) -> None:
    versions = {a["name"]: a["version"] for a in live.client.get("/adapters").json()["adapters"]}

    def resolved(**weights: float) -> list[dict[str, object]]:
        return [{"name": name, "version": versions[name], "weight": weight, "policy": False} for name, weight in weights.items()]

    one = live.generate(prompt=FOX, adapter="math", max_tokens=20)
    assert one["adapter"] == resolved(math=1.0)
    assert one["text"] == live.generate(prompt=FOX, adapter=["math"], weights=[1], max_tokens=20)["text"]
    both = live.generate(prompt=FOX, adapter=["math", "safety"], max_tokens=20)
    assert both["adapter"] == resolved(math=0.5, safety=0.5)
    other = live.generate(prompt=FOX, adapter=["math", "safety"], weights=[1.0, -0.5], max_tokens=20)
    assert other["adapter"] == resolved(math=1.0, safety=-0.5)
    base = live.generate(prompt=FOX, max_tokens=20)
    assert len({r["text"] for r in (base, one, both, other)}) == 4
    assert live.generate(prompt=FOX, adapter="math", weights=[0], max_tokens=20)["text"] == base["text"]


def test_echo_and_logprobs(live: Live) -> None:
    reply = live.generate(prompt="aé b", echo=True, logprobs=2, max_tokens=3)
    logprobs = reply["logprobs"]
    assert reply["text"].startswith("aé b")
    assert len(reply["text"]) == 7
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4, 5, 6]
    assert logprobs["tokens"][-3:] == list(reply["text"][-3:])
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["top_logprobs"][0] == {}
    answered = zip(logprobs["tokens"][-3:], logprobs["token_logprobs"][-3:], logprobs["top_logprobs"][-3:], strict=True)
    for token, value, top in answered:
        assert len(top) == 2
        assert top[token] == value == max(top.values())


def test_logprobs_of_0_have_no_alternatives(live: Live) -> None:
    reply = live.generate(prompt=FOX, logprobs=0, max_tokens=2)
    assert reply["logprobs"]["top_logprobs"] is None
    assert len(reply["logprobs"]["token_logprobs"]) == 2


def test_a_text_is_scored_without_generating(live: Live) -> None:
    reply = live.generate(prompt=FOX, echo=True, logprobs=0, max_tokens=0)
    assert reply["text"] == FOX
    assert reply["usage"]["completion_tokens"] == 0
    assert len(reply["logprobs"]["token_logprobs"]) == len(FOX)


def test_the_answer_ends_before_a_stop_string(live: Live) -> None:
    whole = live.generate(prompt=FOX, max_tokens=60)["text"]
    stop = whole[30:33]
    for value in (stop, [stop, "never said"]):
        reply = live.generate(prompt=FOX, max_tokens=60, stop=value)
        assert reply["text"] == whole[: whole.find(stop)]
        assert reply["finish_reason"] == "stop_sequence"


def test_the_seed_of_a_reply_reproduces_it(live: Live) -> None:
    first = live.generate(prompt=FOX, temperature=1.0, max_tokens=30)
    again = live.generate(prompt=FOX, temperature=1.0, max_tokens=30, seed=first["seed"])
    other = live.generate(prompt=FOX, temperature=1.0, max_tokens=30, seed=first["seed"] + 1)
    assert again["text"] == first["text"] != other["text"]
    assert again["seed"] == first["seed"]


def stream(live: Live, **body: object) -> list[tuple[str, dict[str, Any]]]:
    with live.client.stream("POST", "/generate", json=body | {"stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache"
        return list(events(reply.iter_lines()))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"prompt": FOX, "max_tokens": 25}, id="prompt"),
        pytest.param({"messages": MESSAGES, "adapter": ["math", "safety"], "max_tokens": 25}, id="merge"),
        pytest.param({"prompt": "aé€\r\n\n b", "echo": True, "logprobs": 3, "max_tokens": 5, "adapter": "intent"}, id="echo"),
        pytest.param({"prompt": FOX, "echo": True, "logprobs": 0, "max_tokens": 0}, id="scored"),
        pytest.param({"prompt": FOX, "temperature": 1.5, "seed": 11, "stop": ["e", "zz"], "max_tokens": 50}, id="stop"),
    ],
)
def test_a_stream_has_the_content_of_a_whole_reply(live: Live, body: dict[str, Any]) -> None:
    whole = live.generate(**{"seed": 1} | body)
    *tokens, (last, done) = stream(live, **{"seed": 1} | body)
    assert {name for name, _ in tokens} <= {"token"}
    assert last == "done"
    assert "".join(data["text"] for _, data in tokens) == whole["text"]
    assert lasting(done) == lasting({key: whole.get(key) for key in done} | {"index": 0})
    assert set(done) == set(whole) - {"text", "logprobs", "choices"} | {"index"}
    if whole["logprobs"] is None:
        assert all(data["logprobs"] is None for _, data in tokens)
        return
    for key, values in whole["logprobs"].items():
        parts = [data["logprobs"][key] for _, data in tokens]
        if values is None:
            assert all(part is None for part in parts)
        elif key in ("tokens", "text_offset"):
            assert [one for part in parts for one in part] == values
        else:
            assert sum(len(part) for part in parts) == len(values)


def test_a_stream_comes_token_by_token(live: Live) -> None:
    *tokens, _ = stream(live, prompt=FOX, max_tokens=12)
    assert [len(data["text"]) for _, data in tokens] == [1] * 12


def test_a_refused_stream_is_an_ordinary_error(live: Live) -> None:
    reply = live.client.post("/generate", json={"prompt": "x", "stream": True, "adapter": "nobody"})
    assert reply.status_code == 404
    assert reply.json()["error"]["param"] == "adapter"


def test_health_ready_and_adapters(live: Live) -> None:
    assert live.client.get("/health").json() == {"status": "ok"}
    assert live.client.get("/ready").json() == {"status": "ready"}
    reply = live.client.get("/adapters").json()
    assert reply["base_model"] == "tiny-writer"
    assert [a["name"] for a in reply["adapters"]] == ["intent", "math", "safety"]
    math = reply["adapters"][1]
    assert (math["rank"], math["alpha"], math["templates"]) == (4, 8.0, ["chat"])
    assert 0 < math["sparsity"] < 1
    assert len(math["version"]) == 12


def test_the_api_describes_itself(live: Live) -> None:
    schema = live.client.get("/openapi.json").json()
    assert {"/generate", "/adapters", "/health", "/ready", "/metrics"} <= set(schema["paths"])


def test_metrics_move_with_what_happens(live: Live) -> None:
    counted = {
        "vllm:prompt_tokens_total": {},
        "vllm:generation_tokens_total": {},
        "vllm:request_success_total": {"finished_reason": "length"},
        "vllm:time_to_first_token_seconds_count": {},
        "vllm:e2e_request_latency_seconds_count": {},
        "lori:adapter_requests_total": {"adapter": "math"},
    }
    live.wait_for(running=0, waiting=0)
    before = {name: live.metric(name, **labels) for name, labels in counted.items()}
    for adapter in ("math", ["math", "safety"], None):
        live.generate(prompt=FOX, max_tokens=7, adapter=adapter)
    moved = {name: live.metric(name, **labels) - before[name] for name, labels in counted.items()}
    assert list(moved.values()) == [3 * len(FOX), 21, 3, 3, 3, 2]
    assert live.metric(USAGE) == 0


def test_metrics_show_the_tiers_of_the_adapters(live: Live) -> None:
    live.generate(prompt=FOX, max_tokens=2, adapter=["math", "intent"])
    live.wait_for(running=0, waiting=0)
    assert live.metric("lori:adapters_registered") == 3
    assert live.metric("lori:adapters_resident") >= 2
    assert live.metric("lori:adapters_resident_bytes") > 0
    assert live.metric("lori:adapters_in_use") == live.metric("lori:adapters_pinned") == 0
    assert live.metric("lori:adapter_evictions_total") == 0
    assert live.metric("lori:adapter_load_failures_total") == 0
    num_read = live.metric("lori:adapter_load_seconds_count")
    assert num_read == live.metric("lori:adapters_loaded") >= 2
    live.generate(prompt=FOX, max_tokens=2, adapter=["math", "intent"])
    assert live.metric("lori:adapter_load_seconds_count") == num_read, "resident adapters are not read again"


def test_metrics_that_count_up_are_counters(live: Live) -> None:
    families = {f.name: f.type for f in text_string_to_metric_families(live.client.get("/metrics").text)}
    counters = ("vllm:num_preemptions", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "lori:adapter_evictions")
    for name in (*counters, "lori:adapter_load_failures", "lori:adapter_requests", "vllm:request_success"):
        assert families[name] == "counter"
    assert [name for name, kind in families.items() if kind == "gauge" and name.endswith("_total")] == []


def test_an_unknown_adapter_is_404_with_near_names(live: Live) -> None:
    reply = live.client.post("/generate", json={"prompt": "x", "adapter": ["math", "safty"]})
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert error["message"] == "there is no adapter 'safty': did you mean 'safety'?"
    assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "adapter", 404)


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
    bad("few weights", {"prompt": "x", "adapter": ["math", "safety"], "weights": [1]}, "weights", "has 1 numbers, expected 2"),
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


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a reply. Fail unless the reply has `status` and the shape of every error."""
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return error


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


def test_twenty_clients_at_once_have_the_texts_they_have_alone(live: Live) -> None:
    routes: list[dict[str, object]] = [
        {},
        {"adapter": "math"},
        {"adapter": "safety"},
        {"adapter": ["math", "safety"]},
        {"adapter": ["safety", "intent"], "weights": [0.25, 1.5]},
    ]
    bodies = [
        {"prompt": f"Client {i}: " + FOX * (i % 3), "max_tokens": 10 + 3 * i, **routes[i % len(routes)]}
        | ({"temperature": 0.8, "seed": i} if i % 4 == 3 else {})
        | ({"stop": "e"} if i % 7 == 6 else {})
        for i in range(20)
    ]
    alone = [live.generate(**body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: live.generate(**body), bodies))
    for one, other in zip(together, alone, strict=True):
        assert lasting(one) | {"seed": None} == lasting(other) | {"seed": None}
    live.wait_for(running=0, waiting=0)


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
