"""The operator's caps on the cost of a request: for all requests, and lower ones for a tenant."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.adapters.registry import Registry
from server.engine.admission import Admission
from server.engine.generate_request import Caps, GenerateRequest, RefusedError
from server.engine.request import Request, SamplingParams
from server.engine.step import Emit
from tests.server.fake_service import served
from tests.server.keyed import ACME, OTHER, bearer, write_keys
from tests.server.replies import refusal
from tests.server.rig import FakeEngine

CHAT = {"messages": [{"role": "user", "content": "x"}]}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": "x"}),
    ("/v1/completions", {"prompt": ["x", "y"]}),
    ("/v1/chat/completions", CHAT),
]


class NotingEngine(FakeEngine):
    """An engine that records its requests."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []

    def submit(self, request: Request, emit: Emit) -> None:
        self.requests.append(request)
        super().submit(request, emit)


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_request_has_no_more_tokens_than_the_operator_s_cap(
    tokenizer: PreTrainedTokenizerFast, path: str, body: dict[str, Any]
) -> None:
    engine = NotingEngine()
    with served(tokenizer, engine, max_request_tokens=6) as (client, _):

        def ask(**more: int) -> list[int]:
            engine.requests.clear()
            assert client.post(path, json=body | more).status_code == 200
            return [request.max_tokens * request.sampling.num_choices for request in engine.requests]

        def message(**more: int) -> str:
            error = refusal(client.post(path, json=body | more), 400)
            assert str(error["message"]).startswith(f"{error['param']}: ")
            return str(error["message"])

        assert set(ask()) == {6}  # every default is lowered to the cap
        assert set(ask(n=4)) == {4}
        assert set(ask(max_tokens=6)) == {6}
        assert set(ask(max_tokens=2, n=3)) == {6}
        assert message(max_tokens=7) == "max_tokens: is 7, expected 6 at most: the operator's cap for all answers to one request"
        assert message(max_tokens=4, n=2).startswith("max_tokens: is 4 with n 2, expected 3 at most")
        assert message(n=7).startswith("n: is 7, expected 6 at most")


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_request_takes_no_longer_than_the_operator_s_cap(
    tokenizer: PreTrainedTokenizerFast, path: str, body: dict[str, Any]
) -> None:
    engine = NotingEngine()
    with served(tokenizer, engine, max_request_s=20) as (client, _):
        for more in ({}, {"timeout_s": 20}, {"timeout_s": 0.5}):
            assert client.post(path, json=body | more).status_code in (200, 504)
        assert {request.timeout_s for request in engine.requests} == {20, 0.5}
        error = refusal(client.post(path, json=body | {"timeout_s": 20.5}), 400)
        assert error["param"] == "timeout_s"
        assert error["message"] == "timeout_s: is 20.5, expected 20 at most: the operator's cap for one request"


def test_without_flags_there_are_no_caps(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = NotingEngine()
    with served(tokenizer, engine) as (client, _):
        assert client.post("/generate", json={"prompt": "x", "max_tokens": 90, "timeout_s": 86400}).status_code == 200
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200
    assert [request.timeout_s for request in engine.requests] == [86400, None]


def test_a_tenant_s_caps_are_its_own_or_the_server_s(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    keys = write_keys(tmp_path, acme="max_request_tokens = 3\nmax_request_s = 100.0", other="max_request_s = 2.5")
    engine = NotingEngine()
    with served(tokenizer, engine, keys, max_request_tokens=50, max_request_s=10) as (client, _):
        for key in (ACME, OTHER):
            assert client.post("/generate", json={"prompt": "x"}, headers=bearer(key)).status_code == 200
        error = refusal(client.post("/generate", json={"prompt": "x", "max_tokens": 4}, headers=bearer(ACME)), 400)
        assert error["param"] == "max_tokens"
    assert [(request.max_tokens, request.timeout_s) for request in engine.requests] == [(3, 10), (50, 2.5)]


@pytest.mark.parametrize(
    ("caps", "less", "expected"),
    [
        (Caps(), (None, None), Caps()),
        (Caps(5, 5), (None, None), Caps(5, 5)),
        (Caps(), (5, 5), Caps(5, 5)),
        (Caps(4, 6), (5, 5), Caps(4, 5)),
    ],
)
def test_the_lower_of_two_caps_holds(caps: Caps, less: tuple[float | None, int | None], expected: Caps) -> None:
    assert caps.lowered(*less) == expected


def test_a_request_that_only_scores_its_prompt_is_not_capped(tokenizer: PreTrainedTokenizerFast) -> None:
    admission = Admission(tokenizer, Registry([]), 100)
    scored = GenerateRequest(prompt="x", max_tokens=0, sampling=SamplingParams(echo=True), caps=Caps(max_tokens=1))
    assert admission.admit(scored).max_tokens == 0
    with pytest.raises(RefusedError):
        admission.admit(
            GenerateRequest(prompt="x", max_tokens=1, sampling=SamplingParams(num_choices=2), caps=Caps(max_tokens=1))
        )
