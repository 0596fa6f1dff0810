"""Rights of a tenant's key, over a real socket: the adapters it may use, the policy added to its requests, and its limits."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lori.merge_options import MergeOptions
from server.access.keys import KeyFileError
from server.engine.adapters.registry import Registry
from server.engine.generate_request import GenerateRequest
from server.engine.request import Request
from server.engine.step import Emit
from server.loading import load_service
from server.service.service import Service
from server.settings import Settings
from tests.server.keyed import ACME, ADMIN, OTHER, bearer, make_service, served, write_keys
from tests.server.live import events, wait_until
from tests.server.replies import refusal
from tests.server.rig import FakeEngine, build

FOR_EVER = 10**9


@pytest.fixture(scope="module")
def registry(writer_model: Path, adapters: Path) -> Registry:
    """Return a registry of math, safety and intent."""
    return build(writer_model, adapters).registry


class RecordingEngine(FakeEngine):
    """A fake engine that records the submitted requests."""

    def submit(self, request: Request, emit: Emit) -> None:
        self.__dict__.setdefault("asked", []).append(request)
        super().submit(request, emit)


def ask(**body: object) -> dict[str, Any]:
    return {"prompt": "x"} | body


def names_of(reply: dict[str, Any]) -> list[tuple[str, float]]:
    return [(term["name"], term["weight"]) for term in reply["adapter"]]


def test_a_tenant_sees_and_uses_its_adapters(tokenizer: PreTrainedTokenizerFast, registry: Registry, tmp_path: Path) -> None:
    keys = write_keys(tmp_path, 'adapters = ["math", "int*"]', "adapters = []")
    with served(make_service(tokenizer, keys, registry=registry)) as client:
        for key, expected in ((ACME, ["intent", "math"]), (OTHER, []), (ADMIN, ["intent", "math", "safety"])):
            listed = client.get("/adapters", headers=bearer(key)).json()["adapters"]
            assert sorted(row["name"] for row in listed) == expected
            for name in ("intent", "math", "safety"):
                reply = client.post("/generate", headers=bearer(key), json=ask(adapter=name))
                assert reply.status_code == (200 if name in expected else 404)
            assert client.post("/generate", headers=bearer(key), json=ask()).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter", ["safety", ["math", "safety"], ["safety", "nobody"], ["safety", "safety"], "safety@0", "safet"]
)
def test_a_forbidden_adapter_is_answered_like_a_missing_one(
    tokenizer: PreTrainedTokenizerFast, registry: Registry, tmp_path: Path, adapter: str | list[str]
) -> None:
    keys = write_keys(tmp_path, 'adapters = ["math", "intent"]')
    without = Registry([entry for name, entry in registry.by_name.items() if name != "safety"])
    answers = []
    for known in (registry, without):
        with served(make_service(tokenizer, keys, registry=known), ACME) as client:
            reply = client.post("/generate", json=ask(adapter=adapter))
            headers = {name: value for name, value in reply.headers.items() if name not in ("date", "x-request-id")}
            answers.append((reply.status_code, reply.content, headers))
    assert answers[0] == answers[1]
    assert answers[0][0] in (400, 404)


def test_the_policy_is_added_and_cannot_be_named(tokenizer: PreTrainedTokenizerFast, registry: Registry, tmp_path: Path) -> None:
    keys = write_keys(tmp_path, 'adapters = ["math"]\npolicy = { safety = 0.25 }')
    with served(make_service(tokenizer, keys, registry=registry), ACME) as client:
        for adapter, weights, expected in (
            (None, None, []),
            ("math", None, [("math", 1.0)]),
            (["math"], [0.5], [("math", 0.5)]),
        ):
            body = ask(adapter=adapter) | ({"weights": weights} if weights else {})
            reply = client.post("/generate", json=body)
            assert names_of(reply.json()) == [*expected, ("safety", 0.25)]
        for adapters in ("safety", ["math", "safety"]):
            error = refusal(client.post("/generate", json=ask(adapter=adapters)), 400)
            assert error["param"] == "adapter"
            assert error["message"] == "adapter: names 'safety', which the operator adds to every request of 'acme'"
        other = client.post("/generate", json=ask(adapter="safety"), headers=bearer(OTHER)).json()
        assert names_of(other) == [("safety", 1.0)]


def test_no_request_is_served_without_its_policy(tokenizer: PreTrainedTokenizerFast, registry: Registry, tmp_path: Path) -> None:
    engine = RecordingEngine()
    keys = write_keys(tmp_path, "policy = { ghost = 1.0 }")
    with served(make_service(tokenizer, keys, registry=registry, engine=engine), ACME) as client:
        for body in (ask(), ask(adapter="math"), ask(stream=True)):
            error = refusal(client.post("/generate", json=body), 500)
            assert error["type"] == "AdapterError"
            assert error["message"].endswith("it is not served without them")
        assert client.post("/generate", json=ask(), headers=bearer(OTHER)).status_code == 200
    assert len(engine.__dict__["asked"]) == 1


@pytest.mark.slow
def test_a_policy_of_a_missing_adapter_stops_the_start(writer_model: Path, adapters: Path, tmp_path: Path) -> None:
    def load(acme: str) -> Service:
        keys = write_keys(tmp_path, acme)
        return load_service(
            Settings(model=str(writer_model), adapters=adapters, dtype="float32", kv_cache_gib=0.01, max_batch=2, keys=keys)
        )

    with pytest.raises(KeyFileError, match=r"tenants.acme.policy: there is no adapter 'ghost'"):
        load("policy = { ghost = 1.0, safety = 1.0 }")
    service = load("policy = { safety = 1.0 }")
    assert service.keys
    write_keys(tmp_path, "policy = { ghost = 1.0 }")
    for _ in range(2):
        service.keys.poll()
    caller = service.keys.find(ACME.encode())
    assert caller
    assert caller.policy == (("safety", 1.0),)


def test_a_policy_is_added_to_any_merge(tokenizer: PreTrainedTokenizerFast, registry: Registry) -> None:
    admission = make_service(tokenizer, registry=registry).admission
    ties = GenerateRequest(prompt="x", adapters=("math",), merge=MergeOptions("ties"), tenant="acme", policy=(("safety", 0.25),))
    request = admission.admit(ties)
    assert [(term.name, term.weight) for term in request.policy] == [("safety", 0.25)]
    assert (request.policy[0].digest, 0.25) in request.residents
    assert (request.merged_digest, 1.0) in request.residents
    assert len(request.residents) == 2


def test_the_engine_gets_the_tenant_and_priority_of_a_request(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    engine = RecordingEngine()
    with served(make_service(tokenizer, write_keys(tmp_path, "priority = -3"), engine=engine)) as client:
        for key in (ACME, OTHER, ADMIN):
            client.post("/generate", json=ask(), headers=bearer(key))
    assert [(request.tenant, request.priority) for request in engine.__dict__["asked"]] == [("acme", -3), ("other", 0), ("", 0)]


def test_more_requests_in_a_minute_are_429(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with served(make_service(tokenizer, write_keys(tmp_path, "requests_per_minute = 2")), ACME) as client:
        for _ in range(2):
            assert client.post("/generate", json=ask()).status_code == 200
        reply = client.post("/generate", json=ask())
        error = refusal(reply, 429)
        assert error["type"] == "RateLimitError"
        assert error["message"].startswith("tenant 'acme' may send 2 requests a minute, and has sent them; try again in ")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert client.post("/generate", json=ask(), headers=bearer(OTHER)).status_code == 200


def test_tokenizing_and_detokenizing_count_as_requests(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Regression: a tenant could have any number of long texts tokenized at once."""
    with served(make_service(tokenizer, write_keys(tmp_path, "requests_per_minute = 2")), ACME) as client:
        ids = client.post("/tokenize", json={"prompt": "The quick brown fox"}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "The quick brown fox"}
        refusal(client.post("/tokenize", json={"prompt": "x"}), 429)
        refusal(client.post("/generate", json=ask()), 429)


@pytest.mark.parametrize("route", ["/adapters/compare?names=nobody", "/adapters/nobody"])
def test_reading_about_adapters_counts_as_a_request(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, route: str) -> None:
    """Regression: one comparison runs at a time, so a tenant could keep all others from theirs."""
    with served(make_service(tokenizer, write_keys(tmp_path, "requests_per_minute = 1")), ACME) as client:
        assert client.get(route).status_code in {400, 404}
        refusal(client.get(route), 429)


def test_more_answers_than_may_ever_be_under_way_are_refused_as_such(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Regression: a tenant limited to two requests at once got 64 answers to each."""
    with served(make_service(tokenizer, write_keys(tmp_path, "max_requests = 2")), ACME) as client:
        error = refusal(client.post("/generate", json=ask(n=3)), 400)
        assert (error["param"], "expected 2 at most" in error["message"]) == ("n", True)
        assert client.post("/generate", json=ask(n=2)).status_code == 200


def limited(tokenizer: PreTrainedTokenizerFast, place: Path, engine: FakeEngine) -> Service:
    return make_service(tokenizer, write_keys(place, "max_requests = 1"), engine=engine)


def is_free(service: Service) -> bool:
    return not service.limiter._under_way


def test_more_requests_at_once_are_429_until_a_client_leaves(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    engine = FakeEngine(num_steps=FOR_EVER)
    service = limited(tokenizer, tmp_path, engine)
    with served(service, ACME) as client:
        for _ in range(2):
            with client.stream("POST", "/generate", json=ask(stream=True)) as reply:
                lines = reply.iter_lines()
                assert next(lines) == "event: token"
                refused = client.post("/generate", json=ask())
                assert refusal(refused, 429)["message"] == "tenant 'acme' has 1 answers under way, and may have 1; try again"
                assert refused.headers["retry-after"] == "1"
                with client.stream("POST", "/generate", json=ask(stream=True), headers=bearer(OTHER)) as other:
                    assert other.status_code == 200
            wait_until(lambda: is_free(service), "its place")


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_place_is_given_back_at_the_end(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, is_stream: bool) -> None:
    service = limited(tokenizer, tmp_path, FakeEngine())
    with served(service, ACME) as client:
        for _ in range(3):
            assert client.post("/generate", json=ask(stream=is_stream)).status_code == 200
            wait_until(lambda: is_free(service), "its place")
            assert client.post("/generate", json=ask(adapter="nobody", stream=is_stream)).status_code == 404
            assert is_free(service)


@pytest.mark.slow
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_place_is_given_back_when_the_engine_fails(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, is_stream: bool) -> None:
    service = limited(tokenizer, tmp_path, FakeEngine(dies_at=2))
    with served(service, ACME) as client:
        reply = client.post("/generate", json=ask(stream=is_stream))
        if is_stream:
            assert [name for name, _ in events(reply.text.splitlines())][-1] == "error"
        else:
            refusal(reply, 500)
        wait_until(lambda: is_free(service), "its place")
        refusal(client.post("/generate", json=ask(stream=is_stream)), 503)
        assert is_free(service)


def test_prompts_that_could_never_be_under_way_at_once_are_refused_as_such(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    keys = write_keys(tmp_path, "max_requests = 2", "requests_per_minute = 3")
    with served(make_service(tokenizer, keys, max_requests=4)) as client:
        for key, most, num_left in ((ACME, 2, 2), (OTHER, 3, 2), (ADMIN, 4, 4)):  # a refused batch counts as one request
            body: dict[str, Any] = {"prompt": ["x"] * (most + 1)}
            error = refusal(client.post("/v1/completions", headers=bearer(key), json=body), 400)
            assert (error["param"], f"expected {most} at most" in error["message"]) == ("prompt", True)
            assert client.post("/v1/completions", headers=bearer(key), json={"prompt": ["x"] * num_left}).status_code == 200
