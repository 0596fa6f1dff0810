"""The wait for automatic weights, over a socket: it counts to the request's time, and ends when the client leaves."""

import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from lori.auto_weights import PromptQuery, Selection
from lori.gaussians import Array
from lori.prompt_statistics import NUM_FEATURES, ProbedPrompt
from server.engine.adapter_selection import AdapterSelector, PendingSelection
from server.engine.generate_request import GenerateRequest
from server.engine.model.prompt_probe import PromptProbe
from server.engine.prompt_weights import IsWanted, OnOutcome, PromptWeigher
from server.service.service import Service
from tests.server.keyed import ACME, bearer
from tests.server.live import HOST, LIMIT_S, wait_until
from tests.server.replies import refusal
from tests.server.service.weighed import prompts

pytestmark = pytest.mark.slow
PROMPT = prompts("math", 1)[0]
MESSAGES = [{"role": "user", "content": PROMPT}]
SUM = {"adapter": ["math", "safety"], "weights": "auto"}
AUTO = {"adapter": "auto"}


class Clock:
    """The service's clock, which jumps when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    with monkeypatch.context() as patch:
        patch.setattr("server.service.service.monotonic", clock)
        yield clock


@pytest.mark.parametrize("fields", [SUM, AUTO])
def test_a_request_has_no_more_time_after_its_prompt_was_weighed(
    weighing: httpx.Client, monkeypatch: pytest.MonkeyPatch, clock: Clock, fields: Mapping[str, Any]
) -> None:
    """Regression: the time began anew when the request was submitted to the engine."""
    features = PromptProbe.features

    def slow(self: PromptProbe, given: Sequence[ProbedPrompt]) -> list[Array]:
        clock.now += 500
        return features(self, given)

    body = {"prompt": PROMPT, "max_tokens": 1} | fields
    with monkeypatch.context() as patch:
        patch.setattr(PromptProbe, "features", slow)
        error = refusal(weighing.post("/generate", json=body | {"timeout_s": 400}), 504)
        assert error["message"] == "not done within 400 s"
        assert weighing.post("/generate", json=body | {"timeout_s": 600}).status_code == 200


def test_a_second_selection_has_the_time_that_is_left(
    weighing: httpx.Client, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Regression: each selection had the whole time."""
    resolve, resolved = AdapterSelector.resolve, 0

    def withdraw(self: AdapterSelector, pending: PendingSelection, selection: Selection) -> GenerateRequest:
        nonlocal resolved
        resolved += 1
        clock.now += 300
        return replace(resolve(self, pending, selection), adapters=("gone@000000000000",))

    with monkeypatch.context() as patch:
        patch.setattr(AdapterSelector, "resolve", withdraw)
        body = {"prompt": PROMPT, "adapter": "auto", "max_tokens": 1, "timeout_s": 400}
        refusal(weighing.post("/generate", json=body), 504)
    assert resolved == 2, "the third selection has no time"


@pytest.mark.parametrize("fields", [SUM, AUTO])
def test_a_prompt_is_weighed_at_its_request_s_priority(
    weighing: httpx.Client, monkeypatch: pytest.MonkeyPatch, fields: Mapping[str, Any]
) -> None:
    """Regression: all prompts of a tenant were weighed in the order of their arrival."""
    submit, priorities = PromptWeigher.submit, list[int]()

    def note(
        self: PromptWeigher, query: PromptQuery[Any], priority: int, tenant: str, is_wanted: IsWanted, on_outcome: OnOutcome
    ) -> None:
        if is_wanted():  # a request before this test may have run out of time
            priorities.append(priority)
        submit(self, query, priority, tenant, is_wanted, on_outcome)

    body = {"prompt": PROMPT, "max_tokens": 1} | fields
    with monkeypatch.context() as patch:
        patch.setattr(PromptWeigher, "submit", note)
        for given in ({"priority": 7}, {}):
            reply = weighing.post("/generate", json=body | given)
            assert reply.status_code == 200, reply.text
    assert priorities == [7, 0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": PROMPT} | SUM),
        ("/generate", {"prompt": PROMPT} | AUTO),
        ("/v1/completions", {"prompt": [PROMPT, PROMPT], "model": "math+safety"}),
        ("/v1/chat/completions", {"messages": MESSAGES, "model": "auto"}),
    ],
)
def test_the_request_of_a_client_that_leaves_meanwhile_never_runs(
    weighing: httpx.Client,
    weighing_service: Service,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: Mapping[str, Any],
    *,
    stream: bool,
) -> None:
    """Regression: it was admitted, and began to run."""
    is_probed, may_go_on = threading.Event(), threading.Event()

    def wait(_: PromptProbe, given: Sequence[ProbedPrompt]) -> list[Array]:
        is_probed.set()
        assert may_go_on.wait(LIMIT_S)
        return [np.zeros(NUM_FEATURES) for _ in given]

    content = json.dumps({"max_tokens": 1, "stream": stream} | dict(body))
    headers = {"Host": HOST, "Content-Type": "application/json", "Content-Length": str(len(content))} | bearer(ACME)
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with monkeypatch.context() as patch:
        patch.setattr(PromptProbe, "features", wait)
        try:
            with socket.create_connection((weighing.base_url.host, weighing.base_url.port or 0), LIMIT_S) as connection:
                connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n{content}".encode())
                assert is_probed.wait(LIMIT_S)
            wait_until(lambda: not weighing_service.num_requests, "the end of the request while its prompt is weighed")
        finally:
            may_go_on.set()
    assert weighing.post("/generate", json={"prompt": PROMPT, "max_tokens": 1} | SUM).status_code == 200
