"""Whole answers, from the events of requests; and whether their client is still there to hear them."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
from fastapi import Request as HttpRequest

from server.engine.request import DoneEvent, ErrorEvent, Event, Request, TextEvent, TokenLogprob
from server.errors import FAILURES, EngineError
from server.service import Service

Found = TypeVar("Found")


@dataclass(slots=True)
class Answer:
    """One choice of a request, whole."""

    done: DoneEvent
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it, the prompt first where it is echoed."""
        return "".join(self.texts)


async def collect(service: Service, request: Request) -> list[Answer]:
    """Return the answers, one for each choice. Raises `EngineError`."""
    answers = [Answer(DoneEvent("cancelled", 0, 0)) for _ in range(request.num_choices)]
    async with aclosing(service.generate(request)) as events:
        async for event in events:
            match event:
                case TextEvent():
                    answers[event.choice].texts.append(event.text)
                    answers[event.choice].logprobs += event.logprobs
                case DoneEvent():
                    answers[event.choice].done = event
                case ErrorEvent():
                    raise FAILURES[event.kind](event.message)
    return answers


async def collect_all(service: Service, requests: Sequence[Request]) -> list[list[Answer]]:
    """Return the answers of several requests, which run together. Raises `EngineError`, and ends all, where one fails."""
    answers: list[list[Answer]] = [[] for _ in requests]

    async def answer(place: int, request: Request) -> None:
        answers[place] = await collect(service, request)

    try:
        async with anyio.create_task_group() as group:
            for place, request in enumerate(requests):
                group.start_soon(answer, place, request)
    except* EngineError as errors:
        raise errors.exceptions[0] from errors
    return answers


async def until_disconnect(http: HttpRequest, answering: Awaitable[Found]) -> Found | None:
    """Return what is awaited, or None where the client left first: it is cancelled then. Raises `EngineError` as it does."""
    found: Found | None = None

    async def answer() -> None:
        nonlocal found
        found = await answering
        group.cancel_scope.cancel()

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(answer)
            group.start_soon(watch)
    except* EngineError as errors:
        raise errors.exceptions[0] from errors
    return found


async def interleaved(service: Service, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield the events of several requests as they come, each with the place of its request; closing it aborts them all.

    So does a fault of ours while one is heard, which is raised.
    """
    heard: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()

    async def listen(place: int, request: Request) -> None:
        try:
            async with aclosing(service.generate(request)) as events:
                async for event in events:
                    heard.put_nowait((place, event))
        finally:
            heard.put_nowait((place, None))

    tasks = [asyncio.create_task(listen(place, request)) for place, request in enumerate(requests)]
    try:
        num_open = len(tasks)
        while num_open:
            place, event = await heard.get()
            if event is None:
                await tasks[place]  # raises what ended it, if it was no event
                num_open -= 1
            else:
                yield place, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
