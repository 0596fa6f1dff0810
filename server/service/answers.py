"""Whole answers, collected from the events of requests, and cancellation when a client disconnects."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
from fastapi import Request as HttpRequest

from server.engine.request import DoneEvent, ErrorEvent, Event, Request, TextEvent, TokenLogprob
from server.errors import FAILURES, EngineError
from server.service.service import Service

Result = TypeVar("Result")


@dataclass(slots=True)
class Answer:
    """One whole choice of a request."""

    done: DoneEvent
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of the choice, with the prompt first if the request echoes it."""
        return "".join(self.texts)


async def collect(service: Service, request: Request) -> list[Answer]:
    """Return the answers of a request, one for each choice. Raises `EngineError`."""
    answers = [Answer(DoneEvent("cancelled", 0, 0)) for _ in range(request.sampling.num_choices)]
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
    """Return the answers of several requests, which run together. If one fails, ends all of them and raises its `EngineError`."""
    answers: list[list[Answer]] = [[] for _ in requests]

    async def answer(index: int, request: Request) -> None:
        answers[index] = await collect(service, request)

    try:
        async with anyio.create_task_group() as group:
            for index, request in enumerate(requests):
                group.start_soon(answer, index, request)
    except* EngineError as errors:
        raise errors.exceptions[0] from errors
    return answers


async def until_disconnect(http: HttpRequest, answering: Awaitable[Result]) -> Result | None:
    """Return the result of `answering`, or None if the client disconnects first, which cancels it. Raises its `EngineError`."""
    result: Result | None = None

    async def answer() -> None:
        nonlocal result
        result = await answering
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
    return result


async def interleaved(service: Service, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield the events of several requests as they come, each with the index of its request. Closing it aborts all of them.

    An exception while a request runs, which is a fault of the server, aborts all of them, too, and is raised.
    """
    queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()

    async def listen(index: int, request: Request) -> None:
        try:
            async with aclosing(service.generate(request)) as events:
                async for event in events:
                    queue.put_nowait((index, event))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(listen(index, request)) for index, request in enumerate(requests)]
    try:
        num_open = len(tasks)
        while num_open:
            index, event = await queue.get()
            if event is None:
                await tasks[index]  # raises what ended the request, if no event did
                num_open -= 1
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
