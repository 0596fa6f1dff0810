"""Unmodified clients by others: OpenAI's asynchronous one, and LangChain's. (`test_openai` has OpenAI's synchronous one.)"""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import openai
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI

from tests.server.live import LIMIT_S, Live

FOR_EVER = 3000
"""Tokens of an answer: seconds of work for a tiny model."""
FOX = "The quick brown fox jumps over the lazy dog. "
QUESTIONS = ["What is 12 times 7?", "Who are you?", "x"]


def messages(question: str) -> list[Any]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]


@asynccontextmanager
async def asking(live: Live) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        yield client


async def wait_for_running(live: Live, running: int) -> None:
    await anyio.to_thread.run_sync(partial(live.wait_for, running=running, waiting=0))


def test_openais_async_client_reads_many_streams_at_once(live: Live) -> None:
    async def answer(client: openai.AsyncOpenAI, question: str, texts: dict[str, str]) -> None:
        chunks = await client.chat.completions.create(
            model="math:0.7+safety:0.3", messages=messages(question), max_tokens=20, temperature=0, stream=True
        )
        async for chunk in chunks:
            texts[question] = texts.get(question, "") + "".join(choice.delta.content or "" for choice in chunk.choices)

    async def test() -> dict[str, str]:
        texts: dict[str, str] = {}
        async with asking(live) as client, anyio.create_task_group() as group:
            for question in QUESTIONS:
                group.start_soon(answer, client, question, texts)
        return texts

    adapter = [{"name": "math", "weight": 0.7}, {"name": "safety", "weight": 0.3}]
    own = {one: live.generate(messages=messages(one), adapter=adapter, max_tokens=20)["text"] for one in QUESTIONS}
    assert anyio.run(test) == own


@pytest.mark.parametrize("route", ["completions", "chat"])
@pytest.mark.parametrize("end", ["close", "cancel"])
def test_an_openai_stream_that_is_left_frees_its_place(live: Live, route: str, end: str) -> None:
    async def read(client: openai.AsyncOpenAI, has_begun: anyio.Event) -> None:
        asked: dict[str, Any] = {"model": "math", "max_tokens": FOR_EVER, "temperature": 0, "stream": True}
        create: Callable[..., Coroutine[Any, Any, Any]] = client.completions.create
        if route == "chat":
            create, asked["messages"] = client.chat.completions.create, messages("x")
        else:
            asked["prompt"] = FOX
        async with await create(**asked) as stream:
            async for _ in stream:
                if not has_begun.is_set():
                    await wait_for_running(live, running=1)
                    has_begun.set()
                    if end == "close":
                        return

    async def test() -> None:
        has_begun = anyio.Event()
        async with asking(live) as client:
            async with anyio.create_task_group() as group:
                group.start_soon(read, client, has_begun)
                await has_begun.wait()
                if end == "cancel":
                    group.cancel_scope.cancel()
            await wait_for_running(live, running=0)

    live.wait_for(running=0, waiting=0)
    anyio.run(test)


@pytest.fixture
def chat(live: Live) -> ChatOpenAI:
    return ChatOpenAI(
        model="math+safety", base_url=f"{live.url}/v1", api_key="none", temperature=0, max_tokens=20, timeout=LIMIT_S
    )


def own_answer(live: Live, question: str) -> str:
    text: str = live.generate(messages=messages(question), adapter=["math", "safety"], max_tokens=20)["text"]
    return text


def test_langchain_invokes_streams_and_batches(live: Live, chat: ChatOpenAI) -> None:
    own = [own_answer(live, question) for question in QUESTIONS]
    reply = chat.invoke(messages(QUESTIONS[0]))
    assert reply.content == own[0]
    assert reply.response_metadata["finish_reason"] == "length"
    assert reply.response_metadata["model_name"] == "math+safety"
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["output_tokens"] == 20
    assert [answer.content for answer in chat.batch([messages(question) for question in QUESTIONS])] == own
    chunks = [*chat.stream(messages(QUESTIONS[0]))]
    assert len(chunks) > 5
    assert "".join(str(chunk.content) for chunk in chunks) == own[0]


def test_langchain_has_usage_of_a_stream(chat: ChatOpenAI) -> None:
    whole = None
    for chunk in chat.stream(messages("x"), stream_usage=True):
        assert isinstance(chunk, AIMessageChunk)
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 20


def test_langchain_has_log_probabilities(live: Live, chat: ChatOpenAI) -> None:
    reply = chat.bind(logprobs=True, top_logprobs=2).invoke(messages("x"))
    tokens = reply.response_metadata["logprobs"]["content"]
    own = live.generate(messages=messages("x"), adapter=["math", "safety"], max_tokens=20, logprobs=2)["logprobs"]
    assert [token["token"] for token in tokens] == own["tokens"]
    assert [token["logprob"] for token in tokens] == pytest.approx(own["token_logprobs"], abs=1e-4)
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert all(a["logprob"] >= b["logprob"] for token in tokens for a, b in pairwise(token["top_logprobs"]))


def test_langchain_asks_from_asyncio(live: Live, chat: ChatOpenAI) -> None:
    async def test() -> tuple[object, str]:
        reply = await chat.ainvoke(messages("x"))
        return reply.content, "".join([str(chunk.content) async for chunk in chat.astream(messages("x"))])

    own = own_answer(live, "x")
    assert anyio.run(test) == (own, own)


def test_an_unknown_model_is_langchains_own_error(live: Live) -> None:
    chat = ChatOpenAI(model="maths", base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="The model `maths` does not exist"):
        chat.invoke("x")
