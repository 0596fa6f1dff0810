"""A real vllm-router in front of two plain servers, as docs/deployment.md describes it."""

import json
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from shutil import copytree

import httpx
import openai
import pytest

from tests.needs import need
from tests.server.forked import start_forked
from tests.server.keyed import ACME, ADMIN, bearer, write_keys
from tests.server.live import LIMIT_S, Live, wait_until
from tests.server.vllm_router import routing

SETS = [
    ["math"],
    ["safety"],
    ["intent"],
    ["math", "safety"],
    ["intent", "math"],
    ["intent", "safety"],
    ["intent", "math", "safety"],
]
FOX = "The quick brown fox jumps over the lazy dog. "
FILES = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
SESSION = "X-Session-ID"


@dataclass(frozen=True, slots=True)
class Routed:
    """Two servers on one folder of adapters, and clients that reach them through the router."""

    servers: list[Live]
    adapters: Path
    http: httpx.Client
    client: openai.OpenAI
    log: Path
    """The router's log."""

    def admitted(self) -> list[float]:
        """Return the number of requests that each server has answered or is answering."""
        return [server.metric("lori:merge_terms_count") for server in self.servers]

    def ask(self, names: list[str], max_tokens: int = 2) -> str:
        """Return the text of an answer of these adapters."""
        reply = self.client.completions.create(
            model="+".join(names),
            prompt=FOX,
            max_tokens=max_tokens,
            temperature=0,
            extra_headers={SESSION: "+".join(sorted(names))},
        )
        return reply.choices[0].text

    def home(self, names: list[str]) -> Live:
        """Return the server to which the router sends requests for these adapters."""
        before = self.admitted()
        self.ask(names)
        [server] = [server for server, was, now in zip(self.servers, before, self.admitted(), strict=True) if now > was]
        return server


@pytest.fixture
def routed(writer_model: Path, adapters: Path, tmp_path: Path) -> Iterator[Routed]:
    need("vllm-router")
    shared = copytree(adapters, tmp_path / "adapters")
    options = ["--model", str(writer_model), "--adapters", str(shared), "--keys", str(write_keys(tmp_path))]
    options += ["--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.02"]
    with ExitStack() as stack:
        servers = [stack.enter_context(start_forked(tmp_path / f"server-{number}.log", *options)) for number in (1, 2)]
        for server in servers:
            server.client.headers.update(bearer(ADMIN))
        log = tmp_path / "router.log"
        http = stack.enter_context(routing(log, [server.url for server in servers]))
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=ACME, max_retries=0, timeout=LIMIT_S)
        yield Routed(servers, shared, http, stack.enter_context(client), log)


def _adapters_stay_with_their_server(routed: Routed) -> None:
    order = random.Random(0)
    for names in SETS:
        before = routed.admitted()
        for _ in range(6):
            routed.ask(order.sample(names, len(names)))
        asked = [now - was for now, was in zip(routed.admitted(), before, strict=True)]
        assert sorted(asked) == [0, 6], names


def _chats_without_a_session_all_go_to_one_server(routed: Routed) -> None:
    before = routed.admitted()
    for place in range(6):
        message = {"role": "user", "content": f"What is {place}?"}
        routed.client.chat.completions.create(model="math", messages=[message], max_tokens=2)  # type: ignore[list-item]  # a plain dict
    assert sorted(now - was for now, was in zip(routed.admitted(), before, strict=True)) == [0, 6]


def _no_prompt_is_logged(routed: Routed) -> None:
    """Check the setting that keeps hashed keys out of the log: without a session the router hashes the prompt."""
    routed.client.completions.create(model="math", prompt="a secret", max_tokens=2)
    assert "secret" not in routed.log.read_text()


def _answers_are_the_server_s(routed: Routed) -> None:
    own = routed.servers[0].generate(prompt=FOX, adapter=["math", "safety"], weights=[1, 0.5], max_tokens=24)["text"]
    prompt = {"prompt": FOX, "max_tokens": 24, "temperature": 0}
    named = routed.client.completions.create(model="math:1+safety:0.5", **prompt)  # type: ignore[call-overload]  # a plain dict
    beside = routed.client.completions.create(  # type: ignore[call-overload]  # a plain dict
        model="tiny-writer", extra_body={"adapters": ["math", "safety"], "weights": [1, 0.5]}, **prompt
    )
    assert named.choices[0].text == beside.choices[0].text == own
    parts = list(routed.client.completions.create(model="math:1+safety:0.5", stream=True, **prompt))  # type: ignore[call-overload]  # a plain dict
    assert "".join(choice.text for part in parts for choice in part.choices) == own
    assert len(parts) > 3
    messages = [{"role": "user", "content": FOX}]
    chat = routed.client.chat.completions.create(model="math", messages=messages, max_tokens=24, temperature=0)  # type: ignore[arg-type]  # plain dicts
    assert chat.choices[0].message.content == routed.servers[0].generate(messages=messages, adapter="math", max_tokens=24)["text"]


def _a_client_that_leaves_frees_its_place(routed: Routed) -> None:
    home = routed.home(["math"])
    address = f"{routed.http.base_url.host}:{routed.http.base_url.port}"
    for is_stream in (True, False):
        body = {"model": "math", "prompt": FOX, "max_tokens": 3000, "temperature": 0, "stream": is_stream}
        with closing(HTTPConnection(address, timeout=LIMIT_S)) as connection:
            headers = {"Content-Type": "application/json", SESSION: "math", **bearer(ACME)}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            home.wait_for(running=1)
        home.wait_for(running=0)
    assert home.metric("vllm:request_success_total", finished_reason="abort") == 2


def _invalid_requests_are_refused_in_the_server_s_words(routed: Routed) -> None:
    with pytest.raises(openai.NotFoundError, match="`maths` does not exist"):
        routed.ask(["maths"])
    with pytest.raises(openai.AuthenticationError):
        routed.client.with_options(api_key="lori_unknown").completions.create(model="math", prompt=FOX)
    reply = routed.http.post("/generate", json={"prompt": FOX, "adapter": "math"}, headers=bearer(ACME))
    assert reply.status_code == 400, "the router drops the adapter, and the base model must not answer instead"


def _faults_of_clients_do_not_drive_others_away(routed: Routed) -> None:
    home = routed.home(["math"])
    for _ in range(20):
        with pytest.raises(openai.NotFoundError):
            routed.client.completions.create(model="maths", prompt=FOX, extra_headers={SESSION: "math"})
    assert routed.home(["math"]) is home


def _an_adapter_comes_to_each_server(routed: Routed) -> None:
    """Load an adapter on each server itself. The router would send the change to one of them only, and without the key."""
    first, second = routed.servers
    files = {field: (routed.adapters / "math" / file).read_bytes() for field, file in FILES.items()}
    assert routed.http.post("/adapters/math/load", headers=bearer(ADMIN)).status_code == 401
    assert first.client.post("/adapters", data={"name": "mine"}, files=files).status_code == 201
    assert second.client.post("/adapters/mine/load").status_code == 200
    for server in routed.servers:
        assert server.generate(prompt=FOX, adapter="mine", max_tokens=4)["text"] == routed.ask(["math"], 4)


def _a_killed_server_loses_no_answer_but_a_stream_that_had_begun(routed: Routed) -> None:
    home = routed.home(["math"])
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(routed.ask, SETS[place % len(SETS)], 16) for place in range(48)]
        wait_until(lambda: sum(one.done() for one in asked) >= 4, "some answers")
        body = {"model": "math", "prompt": FOX, "max_tokens": 3000, "temperature": 0, "stream": True}
        headers = {SESSION: "math", **bearer(ACME)}
        with routed.http.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
            chunks = reply.iter_bytes()
            next(chunks)
            os.kill(home.process.pid, signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                b"".join(chunks)
        assert all(len(one.result()) == 16 for one in asked)
    assert len(routed.ask(["math"], 16)) == 16


@pytest.mark.slow
def test_two_servers_behind_a_router(routed: Routed) -> None:
    """Run all parts in one test, since the start takes long."""
    _adapters_stay_with_their_server(routed)
    _chats_without_a_session_all_go_to_one_server(routed)
    _no_prompt_is_logged(routed)
    _answers_are_the_server_s(routed)
    _a_client_that_leaves_frees_its_place(routed)
    _invalid_requests_are_refused_in_the_server_s_words(routed)
    _faults_of_clients_do_not_drive_others_away(routed)
    _an_adapter_comes_to_each_server(routed)
    _a_killed_server_loses_no_answer_but_a_stream_that_had_begun(routed)
