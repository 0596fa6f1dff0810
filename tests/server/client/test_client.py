"""Both clients with a real server: every method and its types, and the end of the work when a client leaves early."""

import inspect
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import anyio
import pytest
from pydantic import BaseModel

from server.client import AsyncClient, BadRequestError, Client, DoneData, NotFoundError, TokenData
from server.client.fields import GenerateFields
from server.schemas.generation import GenerateBody, GenerateReply
from tests.server.both_clients import KINDS, connecting
from tests.server.live import LIMIT_S, Live

FOX = "The quick brown fox jumps over the lazy dog. "
FOR_EVER = 4000
"""Tokens, with the prompt: seconds of work for a tiny model."""
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "llguidance",
)

EVERY_NUMBER: GenerateFields = {
    "prompt": FOX, "max_tokens": 20, "min_tokens": 2, "temperature": 1.1, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 5,
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {"70": 1.5}, "n": 3,
    "ignore_eos": True, "timeout_s": 60, "priority": 3,
}  # fmt: skip


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, live: Live) -> Iterator[Client]:
    with connecting(request.param) as connect:
        yield connect(live.url, timeout_s=LIMIT_S)


def lasting(reply: GenerateReply | DoneData) -> dict[str, Any]:
    """Return the fields that two replies to one request have in common."""
    fields = reply.model_dump(exclude={"id", "timings", "index", "text", "logprobs", "choices"})
    return fields | {"usage": {**fields["usage"], "cached_tokens": None}}


def test_an_answer_is_that_of_the_server(client: Client, live: Live) -> None:
    reply = client.generate(prompt=FOX, adapter=["math", "safety"], weights=[1, 0.5], max_tokens=12, logprobs=1)
    own = live.generate(prompt=FOX, adapter=["math", "safety"], weights=[1, 0.5], max_tokens=12, logprobs=1)
    assert lasting(reply) == lasting(GenerateReply.model_validate(own | {"seed": reply.seed}))
    assert reply.text == own["text"]
    assert [(term.name, term.weight) for term in reply.adapter] == [("math", 1.0), ("safety", 0.5)]
    assert reply.logprobs is not None
    assert reply.logprobs.model_dump() == own["logprobs"]


@pytest.mark.parametrize(
    "fields",
    [
        GenerateFields(messages=[{"role": "user", "content": "Hi"}], template="chat", adapter="math", max_tokens=9, seed=3),
        GenerateFields(prompt=(70, 111, 120), adapter=[{"name": "safety", "weight": -0.5}], max_tokens=9, echo=True, logprobs=2),
        GenerateFields(prompt="a\u2028b\x85", echo=True, max_tokens=5, stop=("zz", "qq"), include_stop=True, adapter=None),
        GenerateFields(prompt=FOX, adapter=("math", "safety"), merge="dare_ties", density=0.4, merge_seed=2, max_tokens=9),
        GenerateFields(prompt="x", grammar={"type": "regex", "pattern": "[a-c]{3}"}, max_tokens=9),
        GenerateFields(prompt="x", grammar={"type": "json_schema", "schema": {"enum": ["yes", "no"]}}, max_tokens=9),
        EVERY_NUMBER,
    ],
)
def test_every_field_gives_the_same_answer_streamed_and_whole(client: Client, fields: GenerateFields) -> None:
    asked: GenerateFields = {"seed": 1, **fields}
    whole = client.generate(**asked)
    choices = [choice.text for choice in whole.choices] if whole.choices else [whole.text]
    texts, ends = [""] * len(choices), []
    for event in client.stream(**asked):
        match event:
            case TokenData(text=text, index=index):
                texts[index] += text
            case DoneData():
                ends.append(event)
    assert texts == choices
    assert sorted(end.index for end in ends) == [*range(len(choices))]
    assert lasting(ends[0]) | {"usage": None} == lasting(whole) | {"usage": None}


def shapes(hint: Any) -> frozenset[Any]:
    """Return the forms of a type on the wire, without its bounds. All elements of a list have one form."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return shapes(parts[0])
    if origin is Literal:
        return frozenset(parts)
    if origin in (Union, types.UnionType):
        return frozenset().union(*(shapes(part) for part in parts if part is not type(None)))
    if origin in (list, Sequence):
        return frozenset(("list", element) for element in shapes(parts[0]))
    if origin in (dict, Mapping):
        return frozenset([("map", *map(shapes, parts))])
    if is_typeddict(hint) or issubclass(hint, BaseModel):
        return frozenset([frozenset(fields_of(hint).items())])
    return frozenset([hint])


def fields_of(kind: Any) -> dict[str, frozenset[Any]]:
    """Return the shapes of the fields of a model or a `TypedDict`."""
    hints = get_type_hints(kind)
    names = dict.fromkeys(hints) if is_typeddict(kind) else {name: field.alias for name, field in kind.model_fields.items()}
    return {alias or name: shapes(hints[name]) for name, alias in names.items()}


def test_the_client_s_fields_are_those_of_the_server() -> None:
    body = fields_of(GenerateBody)
    assert body.pop("stream") == {bool}
    assert fields_of(GenerateFields) == body


def test_the_clients_have_the_same_methods() -> None:
    sync, other = (
        {name: inspect.signature(member) for name, member in vars(kind).items() if not name.startswith("_")}
        for kind in (Client, AsyncClient)
    )
    assert sync.keys() == other.keys()
    for name, signature in sync.items():
        assert signature.parameters == other[name].parameters
        if name != "stream":
            assert signature.return_annotation == other[name].return_annotation
    sides = [inspect.signature(kind).parameters for kind in (Client, AsyncClient)]
    assert sides[0] == sides[1]


def test_a_refusal_names_its_field(client: Client) -> None:
    with pytest.raises(NotFoundError, match=r"404 NotFoundError: there is no adapter 'maths'.* 'math'") as missing:
        client.generate(prompt=FOX, adapter="maths")
    assert missing.value.param == "adapter"
    with pytest.raises(BadRequestError) as refused:
        next(client.stream(prompt=FOX, max_tokens=-1))
    assert refused.value.param == "max_tokens"
    with pytest.raises(BadRequestError, match="max_token: unknown field"):
        client.generate(prompt=FOX, max_token=1)  # type: ignore[call-arg]  # mypy reports it
    with pytest.raises(BadRequestError, match="'prompt' or 'messages'"):
        client.generate()


def test_adapters_are_listed(client: Client, live: Live) -> None:
    listing = client.adapters()
    assert listing.base_model == "tiny-writer"
    assert [adapter.model_dump(mode="json") for adapter in listing.adapters] == live.client.get("/adapters").json()["adapters"]


def test_adapters_are_compared(client: Client) -> None:
    comparison = client.compare(["math", "safety", "intent"])
    assert comparison.names == ["math", "safety", "intent"]
    assert [row[place] for place, row in enumerate(comparison.cosine)] == pytest.approx([1, 1, 1], abs=1e-5)
    assert comparison.overlap[0][2] is None, "math and intent are on two bases"
    with pytest.raises(NotFoundError, match="no adapter 'maths'"):
        client.compare(["maths", "math"])


def test_tokens_and_back(client: Client) -> None:
    reply = client.tokenize(FOX, return_token_strs=True)
    assert reply.count == len(reply.tokens) == len(FOX)
    assert reply.token_strs == [*FOX]
    assert client.detokenize(reply.tokens).prompt == FOX
    chat = client.tokenize([{"role": "user", "content": "Hi"}])
    assert client.detokenize(chat.tokens).prompt == "<|user|>Hi<|end|><|assistant|>"


def test_a_server_is_healthy_and_ready(client: Client) -> None:
    assert client.health().status == "ok"
    assert client.ready().status == "ready"


def test_closing_a_stream_ends_the_request(client: Client, live: Live) -> None:
    live.wait_for(running=0, waiting=0)
    with closing(client.stream(prompt=FOX, max_tokens=FOR_EVER - len(FOX))) as events:
        assert isinstance(next(events), TokenData)
        live.wait_for(running=1)
    live.wait_for(running=0)
    assert client.generate(prompt=FOX, max_tokens=1).finish_reason == "length"


@pytest.mark.parametrize("is_stream", [False, True])
def test_cancelling_ends_the_request(live: Live, is_stream: bool) -> None:
    async def asking(client: AsyncClient) -> None:
        if not is_stream:
            await client.generate(prompt=FOX, max_tokens=FOR_EVER - len(FOX))
        async with aclosing(client.stream(prompt=FOX, max_tokens=FOR_EVER - len(FOX))) as events:
            async for _ in events:
                pass

    async def test() -> None:
        async with AsyncClient(live.url) as client, anyio.create_task_group() as group:
            group.start_soon(asking, client)
            await anyio.to_thread.run_sync(lambda: live.wait_for(running=1))
            group.cancel_scope.cancel()
        await anyio.to_thread.run_sync(lambda: live.wait_for(running=0))

    live.wait_for(running=0, waiting=0)
    anyio.run(test)


@pytest.mark.slow
def test_a_client_imports_no_heavy_packages() -> None:
    """Allow of the engine only the modules of a request and of an adapter's tier, which define plain values."""
    names = ("", ".request", ".grammar", ".adapters", ".adapters.residents")
    words = {f"server.engine{name}" for name in names}
    program = "import sys, server.client; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.split()
    assert not {module.partition(".")[0] for module in modules} & {*HEAVY}
    assert {module for module in modules if module.startswith("server.engine")} <= words
