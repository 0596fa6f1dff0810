"""Requests for `auto`, whose adapters the server selects by the prompt, over a socket."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from lori.auto_weights import Selection
from server.engine.adapter_selection import AdapterSelector, PendingSelection
from server.engine.adapters.registry import Registered
from server.engine.generate_request import GenerateRequest
from server.engine.request import Request
from server.service.service import NUM_SELECTIONS, Service
from tests.server.keyed import ACME, OTHER, bearer, served
from tests.server.live import events
from tests.server.replies import refusal
from tests.server.service.weighed import ALPHABETS, ask, make_service, prompts, weights

pytestmark = pytest.mark.slow


def names(reply: Mapping[str, Any]) -> list[str]:
    return [adapter["name"] for adapter in reply["adapter"]]


@pytest.mark.parametrize("name", ALPHABETS)
def test_a_prompt_gets_its_adapter_or_the_base(weighing: httpx.Client, name: str | None) -> None:
    for prompt in prompts(name, 5, seed=11):
        reply = ask(weighing, prompt, adapter="auto", weights=None)
        selected = [] if name is None else [name]
        assert names(reply) == selected
        assert weights(reply) == [1.0] * len(selected)
        assert (reply["merge"]["method"], reply["merge"]["base_share"]) == ("linear", 1.0 - len(selected))
        assert reply["text"] == ask(weighing, prompt, adapter=selected, weights=None)["text"]
        for automatic in ("auto", ["auto"]):
            assert reply["text"] == ask(weighing, prompt, adapter=["auto"], weights=automatic)["text"]


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


def test_the_operator_s_adapter_is_not_selected_but_added(weighing: httpx.Client) -> None:
    body = {"prompt": prompts("math", 1, seed=14)[0], "adapter": "auto", "max_tokens": 2}
    reply = weighing.post("/generate", json=body, headers=bearer(OTHER)).raise_for_status().json()
    assert [(one["name"], one["weight"], one["policy"]) for one in reply["adapter"]] == [
        ("math", 1.0, False),
        ("intent", 0.6, True),
    ]


@pytest.mark.parametrize(("num_gone", "status"), [(1, 200), (NUM_SELECTIONS - 1, 200), (NUM_SELECTIONS, 429)])
def test_if_an_adapter_was_withdrawn_meanwhile_another_is_selected(
    weighing: httpx.Client, monkeypatch: pytest.MonkeyPatch, num_gone: int, status: int
) -> None:
    resolve, resolved = AdapterSelector.resolve, 0

    def withdraw(self: AdapterSelector, pending: PendingSelection, selection: Selection) -> GenerateRequest:
        nonlocal resolved
        resolved += 1
        request = resolve(self, pending, selection)
        return replace(request, adapters=("gone@000000000000",)) if resolved <= num_gone else request

    with monkeypatch.context() as patch:
        patch.setattr(AdapterSelector, "resolve", withdraw)
        reply = weighing.post("/generate", json={"prompt": prompts("math", 1)[0], "adapter": "auto", "max_tokens": 1})
    assert reply.status_code == status
    assert resolved == min(num_gone + 1, NUM_SELECTIONS)
    if status == 200:
        assert names(reply.json()) == ["math"]
    else:
        assert (
            f"the adapters selected for the prompt were changed {NUM_SELECTIONS} times in a row; try again"
            in refusal(reply, status)["message"]
        )


def test_if_an_adapter_is_withdrawn_after_its_admission_another_is_selected(
    weighing: httpx.Client, weighing_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the client got a 404 for an adapter that it had not named."""
    registry, weigh, withdrawn = weighing_service.registry, Service._with_weights, list[Registered]()

    async def withdraw(self: Service, requests: list[Request], submission: Any) -> list[Request]:
        weighed = await weigh(self, requests, submission)
        if not withdrawn:
            withdrawn.append(registry.by_name["math"])
            registry.withdraw("math")
        return weighed

    monkeypatch.setattr(Service, "_with_weights", withdraw)
    try:
        reply = ask(weighing, prompts("math", 1, seed=15)[0], adapter="auto", weights=None)
    finally:
        registry.put(withdrawn[0])
    assert (names(reply), reply["merge"]["base_share"]) == ([], 1.0)


def test_if_a_selected_adapter_comes_into_the_policy_another_is_selected(
    weighing: httpx.Client, weighing_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the client was refused for an adapter that it had not named."""
    registry, resolve = weighing_service.registry, AdapterSelector.resolve
    intent, math = registry.by_name["intent"], registry.by_name["math"]

    def move(self: AdapterSelector, pending: PendingSelection, selection: Selection) -> GenerateRequest:
        request = resolve(self, pending, selection)
        registry.put(Registered(replace(math.entry, name="intent"), replace(math.summary, name="intent")))
        return request

    monkeypatch.setattr(AdapterSelector, "resolve", move)
    try:
        body = {"prompt": prompts("math", 1, seed=16)[0], "adapter": "auto", "max_tokens": 1}
        reply = weighing.post("/generate", json=body, headers=bearer(OTHER))
    finally:
        registry.put(intent)
    assert reply.status_code == 200, reply.text
    assert [(one["name"], one["policy"]) for one in reply.json()["adapter"]] == [("intent", True)]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"adapter": ["auto", "math"]}, "adapter", "names 'auto' and other adapters, expected 'auto' alone"),
        (
            {"weights": [1]},
            "weights",
            "has the weights [1.0] for the adapter 'auto', expected none or 'auto': the server chooses them",
        ),
        ({"adapter": [{"name": "auto", "weight": 1}]}, "adapter", "has the weights [1.0] for the adapter 'auto'"),
        ({"merge": "ties"}, "merge", "is 'ties' with the adapter 'auto', expected 'linear'"),
    ],
)
def test_what_cannot_be_selected_is_refused(weighing: httpx.Client, fields: Mapping[str, Any], param: str, message: str) -> None:
    error = refusal(weighing.post("/generate", json={"prompt": "12", "adapter": "auto"} | dict(fields)), 400)
    assert (error["param"], message in error["message"]) == (param, True), error["message"]


def test_a_version_of_auto_is_unknown(weighing: httpx.Client) -> None:
    refusal(weighing.post("/generate", json={"prompt": "12", "adapter": "auto@123"}), 404)


def test_auto_in_a_sum_is_refused(weighing: httpx.Client) -> None:
    error = refusal(weighing.post("/v1/completions", json={"model": "math+auto", "prompt": "12"}), 400)
    assert error["message"] == "model: names 'auto' and other adapters, expected 'auto' alone"


@pytest.mark.parametrize("path", ["/adapters/auto", "/adapters/compare?names=auto,math"])
def test_it_is_no_adapter(weighing: httpx.Client, path: str) -> None:
    expected = "is 'auto', which is no adapter: name an adapter"
    assert expected in refusal(weighing.get(path), 400)["message"]


def test_tokens_are_counted_for_it_as_for_any_model(weighing: httpx.Client) -> None:
    def tokenize(**body: Any) -> httpx.Response:
        return weighing.post("/tokenize", json=body)

    ids = tokenize(model="auto", prompt="12 + 3").raise_for_status().json()["tokens"]
    assert ids == tokenize(prompt="12 + 3").raise_for_status().json()["tokens"]
    body = {"model": "auto", "tokens": ids}
    assert weighing.post("/detokenize", json=body).raise_for_status().json()["prompt"] == "12 + 3"
    messages = [{"role": "user", "content": "12"}]
    error = refusal(tokenize(model="auto", messages=messages), 400)
    assert error["message"] == "template: is absent, and the adapters of the model 'auto' decide it, expected one here"
    for model, template in (("auto", "chat"), ("auto:auto", "plain")):
        reply = tokenize(model=model, messages=messages, template=template).raise_for_status().json()
        assert reply == tokenize(messages=messages, template=template).raise_for_status().json()


def test_a_model_with_auto_is_shown_if_and_only_if_requests_for_it_are_admitted(weighing: httpx.Client) -> None:
    for name, is_sound in (("auto", True), ("auto:auto", True), ("auto:1", False), ("auto+math", False)):
        model, request = weighing.get(f"/v1/models/{name}"), {"model": name, "prompt": "12", "max_tokens": 1}
        statuses = {model.status_code, weighing.post("/v1/completions", json=request).status_code}
        assert statuses == {200 if is_sound else 400}, name
        if is_sound:
            assert model.json()["id"] == name


def test_who_may_use_no_adapter_that_can_be_selected_has_no_auto(tiny_model: Path, tmp_path: Path) -> None:
    service = make_service(tiny_model, tmp_path, acme='adapters = ["intent", "other"]')
    with served(service, ACME) as client:
        message = "is 'auto', and none of your adapters that could be selected has statistics of its prompts"
        for reply in (client.get("/v1/models/auto"), client.post("/v1/completions", json={"model": "auto", "prompt": "1"})):
            error = refusal(reply, 400)
            assert (error["param"], message in error["message"]) == ("model", True)
        assert [card["id"] for card in client.get("/v1/models").json()["data"]][1:] == ["intent", "other"]
        error = refusal(client.post("/v1/completions", json={"model": "gpt-4o", "prompt": "12"}), 404)
        assert "'auto'" not in error["message"]


def test_an_unknown_model_is_answered_with_it(weighing: httpx.Client) -> None:
    error = refusal(weighing.post("/v1/completions", json={"model": "gpt-4o", "prompt": "12"}), 404)
    assert "'auto' and the adapters 'intent', 'math', 'other', 'safety'." in error["message"]
