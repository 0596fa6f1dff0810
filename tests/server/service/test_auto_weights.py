"""Requests whose weights come from the prompt, over a socket, on a tiny model whose adapters have statistics."""

import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from lori.base_model import BaseModel, load_base_model
from lori.format import read_config
from lori.prompt_statistics import (
    NUM_FEATURES,
    STATISTICS_FILE,
    Array,
    Background,
    Gaussians,
    ProbedPrompt,
    PromptStatistics,
    fit_background,
    fit_gaussian,
)
from server.engine.model.prompt_probe import PromptProbe
from server.engine.prompt_weights import OVERFLOW
from server.loading import _warn_of_statistics, load_service
from server.service.service import Service
from server.settings import Settings
from tests.server.keyed import ACME, MONITOR, OTHER, bearer, served, write_keys
from tests.server.live import LIMIT_S, events, wait_until
from tests.server.replies import refusal
from tests.server.rig import write_adapter, write_adapters
from training.prompt_features import prompt_features

ALPHABETS = {"math": "0123456789+-", "safety": "XYZ", None: "abcdefghijklmnopqrstuvwxyz "}
"""Letters of the prompts of each adapter, and of nobody's prompts."""
pytestmark = pytest.mark.slow


def prompts(name: str | None, count: int, seed: int = 0) -> list[str]:
    drawn = random.Random(f"{name} {seed}")
    return ["".join(drawn.choices(ALPHABETS[name], k=drawn.randint(8, 40))) for _ in range(count)]


def write_statistics(folder: Path, background_digest: str, gaussian: Gaussians) -> None:
    statistics = PromptStatistics(read_config(folder).lori.content_digest, background_digest, gaussian)
    (folder / STATISTICS_FILE).write_bytes(statistics.to_bytes())


def make_background(base: BaseModel) -> Background:
    return fit_background(base.identity.digest, [prompt_features(base, prompts(None, 300))])


@pytest.fixture(scope="module")
def service(writer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Return a service. `math` and `safety` have statistics, `intent` has none, and `other` has some of another background."""
    place = tmp_path_factory.mktemp("auto")
    base = load_base_model(str(writer_model), torch.float32, "eager")
    adapters = write_adapters(place / "adapters", base)
    background = make_background(base)
    for name in ("math", "safety"):
        gaussian = fit_gaussian(background.whiten(prompt_features(base, prompts(name, 120))))
        write_statistics(adapters / name, background.digest, gaussian)
    write_adapter(adapters / "other", base, seed=5)
    write_statistics(adapters / "other", "0" * 64, gaussian)
    (place / "background.safetensors").write_bytes(background.to_bytes())
    return load_service(
        Settings(
            model=str(writer_model),
            adapters=str(adapters),
            background=place / "background.safetensors",
            keys=write_keys(place, other="policy = { intent = 0.6 }"),
            demo_adapters=False,
            dtype="float32",
            kv_cache_gib=0.05,
        )
    )


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with served(service, ACME) as client:
        yield client


def ask(client: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "adapter": ["math", "safety"], "weights": "auto", "max_tokens": 8, "temperature": 0} | fields
    reply = client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    result: dict[str, Any] = reply.json()
    return result


def weights(reply: Mapping[str, Any]) -> list[float]:
    return [adapter["weight"] for adapter in reply["adapter"]]


@pytest.mark.parametrize(("name", "expected"), [("math", [1.0, 0.0]), ("safety", [0.0, 1.0]), (None, [0.0, 0.0])])
def test_a_prompt_goes_to_its_adapter_or_to_the_base(client: httpx.Client, name: str | None, expected: list[float]) -> None:
    for prompt in prompts(name, 5, seed=1):
        reply = ask(client, prompt)
        assert weights(reply) == expected
        assert (reply["merge"]["method"], reply["merge"]["base_share"]) == ("linear", 1 - sum(expected))


def test_the_answer_is_that_of_the_same_weights_given(client: httpx.Client) -> None:
    for name in ALPHABETS:
        [prompt] = prompts(name, 1, seed=2)
        reply = ask(client, prompt)
        assert reply["text"] == ask(client, prompt, weights=weights(reply))["text"]
    [prompt] = prompts("math", 1, seed=2)
    assert ask(client, prompt)["text"] != ask(client, prompt, adapter=[], weights=None)["text"]


def test_given_weights_have_no_base_share(client: httpx.Client) -> None:
    assert ask(client, "12", weights=[1, 0.5])["merge"]["base_share"] is None


def test_a_stream_s_last_event_has_the_weights(client: httpx.Client) -> None:
    body = {"prompt": "12+34-56+78", "adapter": ["math", "safety"], "weights": "auto", "max_tokens": 2, "stream": True}
    with client.stream("POST", "/generate", json=body) as reply:
        *_, (kind, data) = events(reply.iter_lines())
    assert kind == "done"
    assert weights(data) == [1.0, 0.0]


def test_each_prompt_of_a_completion_has_its_own_weights(client: httpx.Client) -> None:
    [sums], [letters] = prompts("math", 1, seed=3), prompts("safety", 1, seed=3)
    body = {"model": "math+safety", "weights": "auto", "prompt": [sums, letters], "max_tokens": 4, "temperature": 0}
    texts = [choice["text"] for choice in client.post("/v1/completions", json=body).raise_for_status().json()["choices"]]
    assert texts == [ask(client, sums, max_tokens=4)["text"], ask(client, letters, max_tokens=4)["text"]]


def test_in_a_conversation_the_last_message_counts(client: httpx.Client) -> None:
    turns = [prompts("safety", 1)[0], "ok", prompts("math", 1)[0]]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), turns, strict=True)]
    body = {"model": "math+safety", "weights": "auto", "messages": messages, "max_tokens": 2}
    reply = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert weights(reply["lori"]) == [1.0, 0.0]


def test_token_ids_are_probed_as_text(client: httpx.Client) -> None:
    [prompt] = prompts("math", 1, seed=4)
    ids = client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    body = {"prompt": ids, "adapter": ["math", "safety"], "weights": "auto", "max_tokens": 1}
    assert weights(client.post("/generate", json=body).raise_for_status().json()) == [1.0, 0.0]


def test_all_answers_have_the_same_weights(client: httpx.Client) -> None:
    [prompt] = prompts("math", 1, seed=5)
    reply = ask(client, prompt, n=3, temperature=1, seed=4)
    assert weights(reply) == [1.0, 0.0]
    fixed = ask(client, prompt, n=3, temperature=1, seed=4, weights=[1, 0])
    assert [choice["text"] for choice in reply["choices"]] == [choice["text"] for choice in fixed["choices"]]


def test_a_prompt_that_is_only_scored_is_weighed(client: httpx.Client) -> None:
    [prompt] = prompts("math", 1, seed=6)
    body = {"model": "math+safety", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
    auto, fixed = (client.post("/v1/completions", json=body | {"weights": w}).raise_for_status().json() for w in ("auto", [1, 0]))
    assert weights(auto["lori"]) == [1.0, 0.0]
    assert auto["choices"] == fixed["choices"]


def test_the_operator_s_adapters_keep_their_weights(client: httpx.Client) -> None:
    for name in ALPHABETS:
        [prompt] = prompts(name, 1, seed=7)
        body = {"prompt": prompt, "adapter": ["math", "safety"], "weights": "auto", "max_tokens": 8}
        reply = client.post("/generate", json=body, headers=bearer(OTHER)).raise_for_status().json()
        *own, policy = reply["adapter"]
        assert [adapter["weight"] for adapter in own] == [float(adapter["name"] == name) for adapter in own]
        assert (policy["name"], policy["weight"]) == ("intent", 0.6)
        fixed = body | {"weights": [adapter["weight"] for adapter in own]}
        assert reply["text"] == client.post("/generate", json=fixed, headers=bearer(OTHER)).json()["text"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": []}, "weights: is 'auto' without adapters, among which it would choose"),
        ({"merge": "ties"}, "weights: is 'auto' with merge 'ties', expected 'linear'"),
        (
            {"adapter": ["math", "intent"]},
            "weights: is 'auto', and 'intent' has no statistics of its prompts: python -m ",
        ),
        ({"adapter": "other"}, "weights: is 'auto', and 'other' has statistics of another background of its prompts"),
        ({"adapter": [{"name": "math", "weight": 1}]}, "'weights' is for names"),
        ({"weights": "Auto"}, "weights: Input should be 'auto'"),
        ({"weights": 1}, "weights: expected a list of numbers, or 'auto'"),
        ({"weights": ["1"]}, "weights.0: Input should be a valid number"),
    ],
)
def test_what_cannot_be_weighed_is_refused(client: httpx.Client, fields: Mapping[str, Any], message: str) -> None:
    reply = client.post("/generate", json={"prompt": "12", "adapter": ["math", "safety"], "weights": "auto"} | dict(fields))
    error = refusal(reply, 400)
    assert message in error["message"]
    assert error["message"].count("weights") <= 2, "the error concerns one form alone"


Features = Callable[[PromptProbe, Sequence[ProbedPrompt]], list[Array]]


def raising(_: PromptProbe, __: Sequence[ProbedPrompt]) -> list[Array]:
    raise RuntimeError("out of luck")


def overflowing(_: PromptProbe, given: Sequence[ProbedPrompt]) -> list[Array]:
    return [np.full(NUM_FEATURES, np.nan) for _ in given]


@pytest.mark.parametrize(
    ("features", "message"),
    [(raising, "the weights could not be computed: RuntimeError('out of luck')"), (overflowing, OVERFLOW)],
)
def test_a_failed_probe_fails_its_request_alone(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, features: Features, message: str
) -> None:
    body = {"prompt": "12", "adapter": "math", "weights": "auto", "max_tokens": 1}
    with monkeypatch.context() as patch:
        patch.setattr(PromptProbe, "features", features)
        error = refusal(client.post("/generate", json=body), 500)
        assert (error["message"], error["type"]) == (message, "InternalServerError")
        assert client.post("/generate", json=body | {"weights": [1]}).status_code == 200
    assert client.post("/generate", json=body).status_code == 200


def test_the_wait_for_weights_counts_to_the_timeout(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    may_step = threading.Event()

    def wait(_: PromptProbe, given: Sequence[ProbedPrompt]) -> list[Array]:
        assert may_step.wait(LIMIT_S)
        return [np.zeros(NUM_FEATURES) for _ in given]

    body = {"prompt": "12", "adapter": "math", "weights": "auto", "max_tokens": 1}
    with monkeypatch.context() as patch:
        patch.setattr(PromptProbe, "features", wait)
        try:
            error = refusal(client.post("/generate", json=body | {"timeout_s": 0.2}), 504)
        finally:
            may_step.set()
        assert error["message"] == "not done within 0.2 s"
    assert client.post("/generate", json=body).status_code == 200


def test_the_list_says_which_adapters_can_be_weighed(client: httpx.Client) -> None:
    rows = client.get("/adapters").raise_for_status().json()["adapters"]
    assert {row["name"] for row in rows if row["has_prompt_statistics"]} == {"math", "safety"}


def test_a_warning_names_adapters_with_statistics_of_another_background(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_of_statistics(service.admission, service.registry)
    assert "1 adapters have statistics of another background than the server's (--background): other" in caplog.text


def test_the_log_has_the_weights_and_the_base_s_share(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.request")
    client.post(
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


def test_the_metrics_have_the_base_s_shares(client: httpx.Client) -> None:
    def counts() -> dict[str, float]:
        lines = client.get("/metrics", headers=bearer(MONITOR)).raise_for_status().text.splitlines()
        samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {key: float(value) for key, _, value in samples if "auto_base_share" in key}

    before = counts()
    ask(client, prompts("math", 1)[0])
    ask(client, prompts(None, 1)[0])
    changes = {key: value - before[key] for key, value in counts().items()}
    assert [value for key, value in changes.items() if "_count" in key] == [2]
    assert [value for key, value in changes.items() if "_sum" in key] == [1]
