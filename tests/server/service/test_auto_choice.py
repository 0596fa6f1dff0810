"""Requests for `auto`, whose adapters the server chooses by the prompt, over a socket."""

from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from tests.server.keyed import OTHER, bearer
from tests.server.live import events
from tests.server.replies import refusal
from tests.server.service.weighed import ALPHABETS, ask, prompts, weights

pytestmark = pytest.mark.slow


def names(reply: Mapping[str, Any]) -> list[str]:
    return [adapter["name"] for adapter in reply["adapter"]]


@pytest.mark.parametrize("name", ALPHABETS)
def test_a_prompt_gets_its_adapter_or_the_base(weighing: httpx.Client, name: str | None) -> None:
    for prompt in prompts(name, 5, seed=11):
        reply = ask(weighing, prompt, adapter="auto", weights=None)
        chosen = [] if name is None else [name]
        assert names(reply) == chosen
        assert weights(reply) == [1.0] * len(chosen)
        assert (reply["merge"]["method"], reply["merge"]["base_share"]) == ("linear", 1.0 - len(chosen))
        assert reply["text"] == ask(weighing, prompt, adapter=chosen, weights=None)["text"]
        assert reply["text"] == ask(weighing, prompt, adapter=["auto"], weights="auto")["text"]


def test_openai_s_routes_take_it_as_a_model(weighing: httpx.Client) -> None:
    [sums], [letters], [nobody] = (prompts(name, 1, seed=12) for name in ("math", "safety", None))
    body = {"model": "auto", "prompt": [sums, letters, nobody], "max_tokens": 4, "temperature": 0}
    reply = weighing.post("/v1/completions", json=body).raise_for_status().json()
    assert reply["model"] == "auto"
    expected = [(sums, "math"), (letters, "safety"), (nobody, [])]
    assert [choice["text"] for choice in reply["choices"]] == [
        ask(weighing, prompt, adapter=adapter, weights=None, max_tokens=4)["text"] for prompt, adapter in expected
    ]
    chat = {"model": "auto", "messages": [{"role": "user", "content": letters}], "max_tokens": 4}
    chat_reply = weighing.post("/v1/chat/completions", json=chat).raise_for_status().json()
    assert names(chat_reply["lori"]) == ["safety"]
    assert chat_reply["lori"]["merge"]["base_share"] == 0.0
    listed = [model["id"] for model in weighing.get("/v1/models").json()["data"]]
    assert listed.count("auto") == 1
    assert weighing.get("/v1/models/auto").json()["parent"] == listed[0]


def test_a_stream_s_last_event_has_the_adapters(weighing: httpx.Client) -> None:
    body = {"prompt": prompts("math", 1, seed=13)[0], "adapter": "auto", "max_tokens": 2, "stream": True}
    with weighing.stream("POST", "/generate", json=body) as reply:
        *_, (kind, data) = events(reply.iter_lines())
    assert (kind, names(data)) == ("done", ["math"])


def test_the_operator_s_adapter_is_not_chosen_but_added(weighing: httpx.Client) -> None:
    body = {"prompt": prompts("math", 1, seed=14)[0], "adapter": "auto", "max_tokens": 2}
    reply = weighing.post("/generate", json=body, headers=bearer(OTHER)).raise_for_status().json()
    assert [(one["name"], one["weight"], one["policy"]) for one in reply["adapter"]] == [
        ("math", 1.0, False),
        ("intent", 0.6, True),
    ]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"adapter": ["auto", "math"]}, "adapter", "names 'auto' beside others, expected it alone: the server chooses"),
        ({"weights": [1]}, "weights", "is beside the adapter 'auto', whose weights come from the prompt"),
        ({"adapter": [{"name": "auto", "weight": 1}]}, "weights", "is beside the adapter 'auto'"),
        ({"merge": "ties"}, "merge", "is 'ties' with the adapter 'auto', expected 'linear'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(weighing: httpx.Client, fields: Mapping[str, Any], param: str, message: str) -> None:
    error = refusal(weighing.post("/generate", json={"prompt": "12", "adapter": "auto"} | dict(fields)), 400)
    assert (error["param"], message in error["message"]) == (param, True), error["message"]


def test_a_version_of_auto_is_unknown(weighing: httpx.Client) -> None:
    refusal(weighing.post("/generate", json={"prompt": "12", "adapter": "auto@123"}), 404)
    error = refusal(weighing.post("/v1/completions", json={"model": "math+auto", "prompt": "12"}), 400)
    assert error["message"].startswith("model: names 'auto' beside others")
    error = refusal(weighing.post("/tokenize", json={"model": "auto", "messages": [{"role": "user", "content": "12"}]}), 400)
    assert "is 'auto', and no adapter is chosen before there is a request for an answer: name one" in error["message"]
