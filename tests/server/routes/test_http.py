"""A real server in a process of its own, over a real socket: routes, streams and metrics."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lori.base_model import BaseModel
from lori.template import encode
from server.schemas.generation import GenerateReply
from tests.server.live import Live, events
from tests.server.replies import FOX, MESSAGES, USAGE
from tests.server.rig import greedy


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
    assert reply["default_merge"] == "linear", "there is no background"
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
