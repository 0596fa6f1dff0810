"""Bodies with more values or text than a request can use. They are refused by field, before they are parsed or tokenized."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.generate_request import GenerateRequest
from server.engine.request import Request
from server.routes import json_route
from server.schemas import generation
from server.service.text_threads import LONG, TenantSemaphores
from tests.server.fake_service import served
from tests.server.keyed import ACME, OTHER, bearer, write_keys
from tests.server.live import LIMIT_S
from tests.server.replies import refusal
from tests.server.rig import FakeEngine

CONTEXT = 100
"""The fake server's context, in tokens."""
JSON = {"Content-Type": "application/json"}


def numbers(count: int) -> list[int]:
    return [1] * count


@pytest.mark.parametrize(
    ("path", "field"),
    [("/generate", "prompt"), ("/v1/completions", "prompt"), ("/detokenize", "tokens"), ("/generate", "weights")],
)
def test_a_list_far_longer_than_the_context_is_refused_before_it_is_parsed(
    tokenizer: PreTrainedTokenizerFast, path: str, field: str
) -> None:
    with served(tokenizer, FakeEngine()) as (client, _):
        broken = json.dumps({field: numbers(200_000)}).encode()[:-1] + b", that is never read"
        error = refusal(client.post(path, content=broken, headers=JSON), 400)
        assert error["param"] == field
        assert error["message"] == f"{field}: has 200001 values, expected at most {16384 + CONTEXT}"
        assert client.post("/generate", json={"prompt": numbers(5), "max_tokens": 2}).status_code == 200


def test_as_many_prompts_as_a_body_can_hold_may_fill_their_contexts(tokenizer: PreTrainedTokenizerFast) -> None:
    with served(tokenizer, FakeEngine()) as (client, _):
        body = {"prompt": [numbers(CONTEXT - 2)] * 256, "max_tokens": 1}
        reply = client.post("/v1/completions", json=body)
        assert reply.status_code == 200
        assert len(reply.json()["choices"]) == 256


@pytest.mark.parametrize("body", [{"prompt": "long " * 20_000}, {"messages": [{"role": "user", "content": "long " * 20_000}]}])
def test_a_text_of_more_bytes_than_the_context_holds_is_refused_at_once(
    tokenizer: PreTrainedTokenizerFast, body: dict[str, Any]
) -> None:
    [field] = body
    with served(tokenizer, FakeEngine()) as (client, _):
        error = refusal(client.post("/generate", json=body), 400)
        assert error["param"] == field
        assert "bytes, which are more than 100 tokens hold, and the context holds 100 with the answer" in error["message"]


@pytest.mark.parametrize("body", [{"prompt": "long " * 200_000}, {"messages": [{"role": "user", "content": "long " * 200_000}]}])
def test_a_text_that_is_only_tokenized_may_be_longer_but_not_without_end(
    tokenizer: PreTrainedTokenizerFast, body: dict[str, Any]
) -> None:
    [field] = body
    with served(tokenizer, FakeEngine()) as (client, _):
        error = refusal(client.post("/tokenize", json=body), 400)
        assert (error["param"], error["type"]) == (field, "BadRequestError")
        assert "131072" in error["message"]
        assert client.post("/tokenize", json={"prompt": "x" * 100_000}).json()["count"] == 100_000


class StuckAdmission:
    """A fake admission that blocks the long prompts of one tenant until `may_go_on` is set."""

    def __init__(self, admission: Any) -> None:
        self._admission, self.max_context = admission, admission.max_context
        self.num_stuck, self.may_go_on = threading.Semaphore(0), threading.Event()

    def admit(self, ask: GenerateRequest) -> Request:
        if isinstance(ask.prompt, Sequence) and len(ask.prompt) > LONG and ask.tenant == "acme":
            self.num_stuck.release()
            assert self.may_go_on.wait(LIMIT_S)
        return cast(Request, self._admission.admit(ask))


@pytest.mark.slow
def test_a_tenant_s_long_texts_do_not_block_other_tenants(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Regression: forty long texts occupied every thread in which requests are admitted."""
    long, short = {"prompt": "x" * (LONG + 1)}, {"prompt": "x", "max_tokens": 2}
    keys = write_keys(tmp_path)
    with served(tokenizer, FakeEngine(), keys) as (client, service), ThreadPoolExecutor(50) as pool:
        stuck = service.admission = cast(Any, StuckAdmission(service.admission))
        waiting = [pool.submit(client.post, "/generate", json=long, headers=bearer(ACME)) for _ in range(45)]
        try:
            assert stuck.num_stuck.acquire(timeout=LIMIT_S)
            assert client.post("/generate", json=short, headers=bearer(ACME)).status_code == 200
            assert client.post("/generate", json=short, headers=bearer(OTHER)).status_code == 200
            refusal(client.post("/generate", json=long, headers=bearer(OTHER)), 400)
            assert not stuck.num_stuck.acquire(blocking=False)
        finally:
            stuck.may_go_on.set()
        assert {reply.result().status_code for reply in waiting} == {400}


def test_after_a_long_body_parsing_pauses(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: four long bodies in a row blocked all other clients for the sum of their parsing times."""
    rests: list[tuple[float, bool]] = []

    async def rest(seconds: float) -> None:
        rests.append((seconds, service.parse_lock.locked()))

    monkeypatch.setattr(json_route, "sleep", rest)
    with served(tokenizer, FakeEngine()) as (client, service):
        for content in (b'{"prompt": "x", "max_tokens": 1}', b"[" * 1000):
            client.post("/generate", content=content, headers=JSON)
        assert rests == []
        for content in (b'{"prompt": "x"}' + b" " * json_route.SHORT_BODY, b"[" * 100_000):
            client.post("/generate", content=content, headers=JSON)
        assert len(rests) == 2
        assert all(seconds >= json_route.SHORT_BODY / json_route.BYTES_PER_S and is_locked for seconds, is_locked in rests)
        assert not service.parse_lock.locked()


def test_one_long_body_of_each_client_waits_to_be_parsed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Regression: all long bodies waited in one queue, where all of one tenant's came before the first of another's."""
    entered: list[str] = []

    class Recorded(TenantSemaphores):
        def acquire(self, tenant: str) -> AbstractAsyncContextManager[None]:
            entered.append(tenant)
            return super().acquire(tenant)

    content = b'{"prompt": "x"}' + b" " * json_route.SHORT_BODY
    with served(tokenizer, FakeEngine(), write_keys(tmp_path)) as (client, service):
        service.parse_semaphores = Recorded(1)
        for key in (ACME, OTHER):
            client.post("/generate", content=content, headers=JSON | bearer(key)).raise_for_status()
        assert entered == ["tenant acme", "tenant other"]


def test_the_parsed_values_of_a_long_body_count_too(tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that parsed values are counted: a number of five digits takes 6 bytes of a body, and 44 as a Python object."""
    lists = [[250] * (CONTEXT - 2)] * 200
    with served(tokenizer, FakeEngine(), max_bodies_mib=7, max_body_bytes=200_000) as (client, service):
        body = {"prompt": lists, "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 200
        assert service.bodies.take("address 127.0.0.1", 2_700_000) is None
        reply = client.post("/v1/completions", json=body)
        assert "--max-bodies-mib" in refusal(reply, 429)["message"]
        assert reply.headers["Retry-After"] == "1"
        assert client.post("/v1/completions", json=body | {"prompt": lists[:100]}).status_code == 200


def test_a_body_of_the_most_values_fits_the_smallest_bound(tokenizer: PreTrainedTokenizerFast) -> None:
    """Regression: every try of this body was answered with "try again"."""
    body = {"prompt": [[1] * (CONTEXT - 2)] * 1000, "max_tokens": 1}
    with served(tokenizer, FakeEngine(), max_bodies_mib=4) as (client, _):
        error = refusal(client.post("/v1/completions", json=body), 400)
        assert error["param"] == "prompt"


def test_the_schema_describes_a_token() -> None:
    described = generation.GenerateBody.model_json_schema()["properties"]["prompt"]["anyOf"][0]["oneOf"][1]
    assert described["items"] == {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}


def test_a_refusal_names_the_invalid_token(tokenizer: PreTrainedTokenizerFast) -> None:
    with served(tokenizer, FakeEngine()) as (client, _):

        def message(token: float) -> str:
            reply: httpx.Response = client.post("/generate", json={"prompt": [1, token]})
            return str(refusal(reply, 400)["message"])

        assert message(10**30) == "prompt: has the token of 100 bits, expected 0 to 2147483647"
        assert message(2**31) == "prompt: has the token 2147483648, expected 0 to 2147483647"
        assert message(257) == "prompt: has the token 257, expected 0 to 256"
