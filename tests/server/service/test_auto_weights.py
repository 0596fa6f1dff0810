"""Requests whose weights come from the prompt, over a socket, on a tiny model whose adapters have statistics."""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lori.gaussians import Array
from lori.prompt_statistics import NUM_FEATURES, ProbedPrompt
from server.engine.generate_request import GenerateRequest
from server.engine.model.prompt_probe import PromptProbe
from server.engine.prompt_weights import OVERFLOW
from server.loading import _log_statistics
from server.service.service import Service
from tests.server.keyed import MONITOR, OTHER, bearer
from tests.server.live import LIMIT_S, events, serve_here, wait_until
from tests.server.replies import refusal
from tests.server.service.weighed import ALPHABETS, ask, make_service, prompts, weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "expected"), [("math", [1.0, 0.0]), ("safety", [0.0, 1.0]), (None, [0.0, 0.0])])
def test_a_prompt_goes_to_its_adapter_or_to_the_base(weighing: httpx.Client, name: str | None, expected: list[float]) -> None:
    for prompt in prompts(name, 5, seed=1):
        reply = ask(weighing, prompt)
        assert weights(reply) == expected
        assert (reply["merge"]["method"], reply["merge"]["base_share"]) == ("linear", 1 - sum(expected))


def test_the_answer_is_that_of_the_same_weights_given(weighing: httpx.Client) -> None:
    for name in ALPHABETS:
        [prompt] = prompts(name, 1, seed=2)
        reply = ask(weighing, prompt)
        assert reply["text"] == ask(weighing, prompt, weights=weights(reply))["text"]
    [prompt] = prompts("math", 1, seed=2)
    assert ask(weighing, prompt)["text"] != ask(weighing, prompt, adapter=[], weights=None)["text"]


def test_weights_are_automatic_where_a_request_has_none(weighing: httpx.Client) -> None:
    [prompt] = prompts("math", 1, seed=2)
    reply, automatic = ask(weighing, prompt, weights=None), ask(weighing, prompt)
    assert weights(reply) == [1.0, 0.0]
    assert (reply["text"], reply["merge"]) == (automatic["text"], automatic["merge"])
    assert weighing.get("/adapters").json()["default_merge"] == "auto"


def test_a_model_s_name_without_weights_has_automatic_ones(weighing: httpx.Client) -> None:
    body = {"model": "math+safety", "messages": [{"role": "user", "content": prompts("safety", 1)[0]}], "max_tokens": 2}
    assert weights(weighing.post("/v1/chat/completions", json=body).raise_for_status().json()["lori"]) == [0.0, 1.0]


def test_an_adapter_keeps_its_given_weight_beside_automatic_ones(weighing: httpx.Client) -> None:
    # `intent` has no statistics of its prompts, and needs none.
    for name, weight, base_share in (("math", 1.0, 0.0), (None, 0.0, 1.0)):
        [prompt] = prompts(name, 1, seed=2)
        reply = ask(weighing, prompt, adapter=["intent", "math"], weights=[0.5, "auto"])
        assert (weights(reply), reply["merge"]["base_share"]) == ([0.5, weight], base_share)
        assert reply["text"] == ask(weighing, prompt, adapter=["intent", "math"], weights=[0.5, weight])["text"]
        objects = [{"name": "intent", "weight": 0.5}, {"name": "math", "weight": "auto"}]
        assert weights(ask(weighing, prompt, adapter=objects, weights=None)) == [0.5, weight]
        body = {"model": "intent:0.5+math:auto", "prompt": prompt, "max_tokens": 2}
        completion = weighing.post("/v1/completions", json=body).raise_for_status().json()
        assert weights(completion["lori"]) == [0.5, weight]


def test_a_prompt_that_is_scored_has_automatic_weights_only_if_it_asks_for_them(weighing: httpx.Client) -> None:
    body = {"model": "math+safety", "prompt": prompts("math", 1)[0], "max_tokens": 0, "echo": True, "logprobs": 1}
    reply = weighing.post("/v1/completions", json=body).raise_for_status().json()
    assert weights(reply["lori"]) == [0.5, 0.5]


def test_weights_are_equal_where_they_cannot_be_automatic(weighing: httpx.Client) -> None:
    reply = ask(weighing, "12", adapter=["math", "intent"], weights=None)
    assert weights(reply) == [0.5, 0.5]
    assert reply["merge"]["base_share"] is None


def test_the_operator_may_make_equal_weights_the_default(writer_model: Path, tmp_path: Path) -> None:
    service = make_service(writer_model, tmp_path, has_keys=False, default_merge="linear")
    request = service.admission.admit(GenerateRequest(prompt="12", adapters=("math", "safety")))
    assert (request.auto, [term.weight for term in request.terms]) == (None, [0.5, 0.5])
    with serve_here(service) as client:
        assert client.get("/adapters").json()["default_merge"] == "linear"


def test_the_fingerprint_names_what_decides_the_weights(weighing: httpx.Client) -> None:
    assert re.search(r"-auto-[0-9a-f]{8}$", ask(weighing, "12")["system_fingerprint"])


def test_given_weights_have_no_base_share(weighing: httpx.Client) -> None:
    assert ask(weighing, "12", weights=[1, 0.5])["merge"]["base_share"] is None


def test_a_stream_s_last_event_has_the_weights(weighing: httpx.Client) -> None:
    body = {"prompt": "12+34-56+78", "adapter": ["math", "safety"], "weights": "auto", "max_tokens": 2, "stream": True}
    with weighing.stream("POST", "/generate", json=body) as reply:
        *_, (kind, data) = events(reply.iter_lines())
    assert kind == "done"
    assert weights(data) == [1.0, 0.0]


def test_each_prompt_of_a_completion_has_its_own_weights(weighing: httpx.Client) -> None:
    [sums], [letters] = prompts("math", 1, seed=3), prompts("safety", 1, seed=3)
    body = {"model": "math+safety", "weights": "auto", "prompt": [sums, letters], "max_tokens": 4, "temperature": 0}
    reply = weighing.post("/v1/completions", json=body | {"n": 2}).raise_for_status().json()
    assert [weights(choice["lori"]) for choice in reply["choices"]] == [[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2
    texts = [choice["text"] for choice in reply["choices"][::2]]
    assert texts == [ask(weighing, sums, max_tokens=4)["text"], ask(weighing, letters, max_tokens=4)["text"]]


def test_in_a_conversation_the_last_message_counts(weighing: httpx.Client) -> None:
    turns = [prompts("safety", 1)[0], "ok", prompts("math", 1)[0]]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), turns, strict=True)]
    body = {"model": "math+safety", "weights": "auto", "messages": messages, "max_tokens": 2}
    reply = weighing.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert weights(reply["lori"]) == [1.0, 0.0]


def test_token_ids_are_probed_as_text(weighing: httpx.Client) -> None:
    [prompt] = prompts("math", 1, seed=4)
    ids = weighing.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    body = {"prompt": ids, "adapter": ["math", "safety"], "weights": "auto", "max_tokens": 1}
    assert weights(weighing.post("/generate", json=body).raise_for_status().json()) == [1.0, 0.0]


def test_all_answers_have_the_same_weights(weighing: httpx.Client) -> None:
    [prompt] = prompts("math", 1, seed=5)
    reply = ask(weighing, prompt, n=3, temperature=1, seed=4)
    assert weights(reply) == [1.0, 0.0]
    fixed = ask(weighing, prompt, n=3, temperature=1, seed=4, weights=[1, 0])
    assert [choice["text"] for choice in reply["choices"]] == [choice["text"] for choice in fixed["choices"]]


def test_a_prompt_that_is_only_scored_is_weighed(weighing: httpx.Client) -> None:
    [prompt] = prompts("math", 1, seed=6)
    body = {"model": "math+safety", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
    auto, fixed = (
        weighing.post("/v1/completions", json=body | {"weights": w}).raise_for_status().json() for w in ("auto", [1, 0])
    )
    assert weights(auto["lori"]) == [1.0, 0.0]
    assert auto["choices"] == fixed["choices"]


def test_the_operator_s_adapters_keep_their_weights(weighing: httpx.Client) -> None:
    for name in ALPHABETS:
        [prompt] = prompts(name, 1, seed=7)
        body = {"prompt": prompt, "adapter": ["math", "safety"], "weights": "auto", "max_tokens": 8}
        reply = weighing.post("/generate", json=body, headers=bearer(OTHER)).raise_for_status().json()
        *own, policy = reply["adapter"]
        assert [adapter["weight"] for adapter in own] == [float(adapter["name"] == name) for adapter in own]
        assert (policy["name"], policy["weight"]) == ("intent", 0.6)
        fixed = body | {"weights": [adapter["weight"] for adapter in own]}
        assert reply["text"] == weighing.post("/generate", json=fixed, headers=bearer(OTHER)).json()["text"]
        mixed = body | {"weights": ["auto", -0.5]}
        *own, policy = weighing.post("/generate", json=mixed, headers=bearer(OTHER)).raise_for_status().json()["adapter"]
        assert [adapter["weight"] for adapter in [*own, policy]] == [float(name == "math"), -0.5, 0.6]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": []}, "weights: asks for 'auto' without adapters, among which it would choose"),
        ({"merge": "ties"}, "weights: asks for 'auto' with merge 'ties', expected 'linear'"),
        (
            {"adapter": ["math", "intent"]},
            "weights: asks for 'auto', and 'intent' has no statistics of its prompts: python -m ",
        ),
        ({"adapter": "other"}, "weights: asks for 'auto', and 'other' has statistics of another background of its prompts"),
        ({"adapter": [{"name": "math", "weight": 1}]}, "'weights' is for names"),
        ({"weights": "Auto"}, "weights: Input should be 'auto'"),
        ({"weights": 1}, "weights: expected a list of weights, or 'auto'"),
        ({"weights": ["1", 1]}, "weights.0: expected a number, or 'auto', found '1'"),
        ({"weights": [1, None]}, "weights.1: expected a number, or 'auto', found None"),
        ({"adapter": ["math", "intent"], "weights": [1, "auto"]}, "weights: asks for 'auto', and 'intent' has no statistics"),
    ],
)
def test_what_cannot_be_weighed_is_refused(weighing: httpx.Client, fields: Mapping[str, Any], message: str) -> None:
    reply = weighing.post("/generate", json={"prompt": "12", "adapter": ["math", "safety"], "weights": "auto"} | dict(fields))
    error = refusal(reply, 400)
    assert message in error["message"]
    assert error["message"].count("weights") <= 2, "the error concerns one form alone"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/generate", {"prompt": "12", "adapter": [{"name": "intent", "weight": "auto"}]}, "adapter"),
        ("/v1/completions", {"prompt": "12", "model": "intent:auto"}, "model"),
        ("/v1/completions", {"prompt": "12", "adapters": [{"name": "intent", "weight": "auto"}]}, "adapters"),
        ("/v1/completions", {"prompt": "12", "model": "intent", "weights": "auto"}, "weights"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "12"}], "model": "intent:auto"}, "model"),
    ],
)
def test_the_refusal_names_the_field_with_the_weights(
    weighing: httpx.Client, path: str, fields: Mapping[str, Any], param: str
) -> None:
    error = refusal(weighing.post(path, json=fields), 400)
    assert error["param"] == param
    assert "asks for 'auto', and 'intent' has no statistics" in error["message"]


def test_a_model_is_shown_only_if_requests_can_name_it(weighing: httpx.Client) -> None:
    assert weighing.get("/v1/models/math:auto+intent:1").raise_for_status().json()["id"] == "math:auto+intent:1"
    error = refusal(weighing.get("/v1/models/math:1+intent:auto"), 400)
    assert error["param"] == "model"
    assert "'intent' has no statistics" in error["message"]


Features = Callable[[PromptProbe, Sequence[ProbedPrompt]], list[Array]]


def raising(_: PromptProbe, __: Sequence[ProbedPrompt]) -> list[Array]:
    raise RuntimeError("out of luck")


def overflowing(_: PromptProbe, given: Sequence[ProbedPrompt]) -> list[Array]:
    return [np.full(NUM_FEATURES, np.nan) for _ in given]


@pytest.mark.parametrize(
    ("features", "message"),
    [(raising, "the prompt's features could not be computed: RuntimeError('out of luck')"), (overflowing, OVERFLOW)],
)
def test_a_failed_probe_fails_its_request_alone(
    weighing: httpx.Client, monkeypatch: pytest.MonkeyPatch, features: Features, message: str
) -> None:
    body = {"prompt": "12", "adapter": "math", "weights": "auto", "max_tokens": 1}
    with monkeypatch.context() as patch:
        patch.setattr(PromptProbe, "features", features)
        error = refusal(weighing.post("/generate", json=body), 500)
        assert (error["message"], error["type"]) == (message, "InternalServerError")
        assert weighing.post("/generate", json=body | {"weights": [1]}).status_code == 200
    assert weighing.post("/generate", json=body).status_code == 200


def test_the_wait_for_weights_counts_to_the_timeout(weighing: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    may_step = threading.Event()

    def wait(_: PromptProbe, given: Sequence[ProbedPrompt]) -> list[Array]:
        assert may_step.wait(LIMIT_S)
        return [np.zeros(NUM_FEATURES) for _ in given]

    body = {"prompt": "12", "adapter": "math", "weights": "auto", "max_tokens": 1}
    with monkeypatch.context() as patch:
        patch.setattr(PromptProbe, "features", wait)
        try:
            error = refusal(weighing.post("/generate", json=body | {"timeout_s": 0.2}), 504)
        finally:
            may_step.set()
        assert error["message"] == "not done within 0.2 s"
    assert weighing.post("/generate", json=body).status_code == 200


def test_the_list_says_which_adapters_can_be_weighed(weighing: httpx.Client) -> None:
    rows = weighing.get("/adapters").raise_for_status().json()["adapters"]
    assert {row["name"] for row in rows if row["has_prompt_statistics"]} == {"math", "safety"}


def test_a_comparison_has_the_weights_on_each_other_s_prompts(weighing: httpx.Client) -> None:
    reply = weighing.get("/adapters/compare?names=math,intent,safety").raise_for_status().json()
    # `intent` has no statistics, and `other` has those of another background.
    assert reply["auto_weight"] == [[1.0, None, 0.0], [None, None, None], [0.0, None, 1.0]]
    reply = weighing.get("/adapters/compare?names=intent,other").raise_for_status().json()
    assert reply["auto_weight"] == [[None, None], [None, None]]


def test_the_log_names_the_adapters_whose_weights_cannot_be_automatic(
    weighing_service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.loading")
    _log_statistics(weighing_service.admission, weighing_service.registry)
    assert "1 of 4 adapters have statistics of another background than the server's (--background): other" in caplog.text
    assert "1 of 4 adapters have no statistics of their prompts (python -m training.calibrate): intent" in caplog.text


def test_the_log_has_the_weights_and_the_base_s_share(weighing: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.request")
    weighing.post(
        "/generate",
        json={"prompt": prompts(None, 1)[0], "adapter": ["math", "safety"], "weights": "auto", "max_tokens": 1},
        headers={"X-Request-ID": "mine"},
    )

    def rows() -> list[dict[str, Any]]:
        return [vars(record) for record in caplog.records if getattr(record, "request_id", "") == "mine"]

    wait_until(lambda: bool(rows()), "the log line")  # it comes after the answer
    [row] = rows()
    assert row["weights"] == [0.0, 0.0]
    assert row["base_share"] == 1.0


def test_the_metrics_have_the_base_s_shares_and_the_wait_for_weights(weighing: httpx.Client) -> None:
    def counts() -> dict[str, float]:
        lines = weighing.get("/metrics", headers=bearer(MONITOR)).raise_for_status().text.splitlines()
        samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {key: float(value) for key, _, value in samples if "_count" in key or "_sum" in key}

    before, started = counts(), time.monotonic()
    ask(weighing, prompts("math", 1)[0])
    ask(weighing, prompts(None, 1)[0])
    ask(weighing, prompts("math", 1)[0], weights=[1, 0.5])
    elapsed = time.monotonic() - started
    labels = '{engine="0",model_name="tiny-writer"}'
    changes = {key.removesuffix(labels): value - before[key] for key, value in counts().items()}
    assert (changes["lori:auto_base_share_count"], changes["lori:auto_base_share_sum"]) == (2, 1)
    assert changes["lori:auto_weights_seconds_count"] == 2
    assert 0 < changes["lori:auto_weights_seconds_sum"] < elapsed
