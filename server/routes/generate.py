"""POST /generate: this server's own route. Translates only."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.sse import format_sse_event
from pydantic import BaseModel

from server.access.caller import Caller
from server.engine.admission import Ask
from server.engine.request import DoneEvent, ErrorEvent, Sampling, TextEvent, TokenLogprob
from server.engine.request import Request as EngineRequest
from server.errors import FAILURES, TABLE, EngineError
from server.routes.dependencies import CallerOf, ServiceOf
from server.routes.event_stream import EventStream
from server.schemas import (
    DoneData,
    ErrorReply,
    GenerateBody,
    GenerateReply,
    Logprobs,
    ResolvedAdapter,
    TokenData,
    Usage,
    error_reply,
)
from server.service import Service

router = APIRouter()
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string", "description": "`token` events, then `done` or `error`"}}}
    }
}


@router.post("/generate", response_model=GenerateReply, responses=STREAM)
async def generate(body: GenerateBody, http: Request, service: ServiceOf, caller: CallerOf) -> GenerateReply | Response:
    """Continues a prompt or answers messages, with any adapters of the server added together."""
    async with AsyncExitStack() as place:
        request = await place.enter_async_context(service.admitted(to_ask(body, caller)))
        if body.stream:
            return EventStream(stream(service, request), place.pop_all(), service.settings.max_unread_s)
        reply = await until_disconnect(http, service, request)
    # A client that has gone hears nothing; 499 is what proxies' logs call it.
    return Response(status_code=499) if reply is None else reply


def to_ask(body: GenerateBody, caller: Caller) -> Ask:
    """Returns what the caller asks for with a body."""
    names = [body.adapter] if isinstance(body.adapter, str) else body.adapter or []
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    prompt = body.prompt if body.messages is None else body.messages
    assert prompt is not None
    return Ask(
        prompt=prompt,
        template=body.template,
        adapters=tuple(names),
        weights=None if body.weights is None else tuple(body.weights),
        max_tokens=body.max_tokens,
        sampling=Sampling(temperature=body.temperature),
        seed=body.seed,
        stop=tuple(stops),
        ignore_eos=body.ignore_eos,
        num_logprobs=body.logprobs,
        echo=body.echo,
        priority=caller.priority,
        tenant=caller.tenant,
        caller=caller,
    )


async def until_disconnect(http: Request, service: Service, request: EngineRequest) -> GenerateReply | None:
    """Returns the whole reply, or None where the client left first: the request is aborted then."""
    reply: GenerateReply | None = None

    async def answer() -> None:
        nonlocal reply
        reply = await collect(service, request)
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
    return reply


async def collect(service: Service, request: EngineRequest) -> GenerateReply:
    """Returns the whole reply. Raises `EngineError`."""
    texts: list[str] = []
    logprobs: list[TokenLogprob] = []
    async with aclosing(service.generate(request)) as events:
        async for event in events:
            match event:
                case TextEvent():
                    texts.append(event.text)
                    logprobs += event.logprobs
                case DoneEvent():
                    done = done_data(request, event)
                case ErrorEvent():
                    raise FAILURES[event.kind](event.message)
    return GenerateReply(text="".join(texts), logprobs=to_logprobs(request, logprobs), **done.model_dump())


async def stream(service: Service, request: EngineRequest) -> AsyncGenerator[bytes, None]:
    """Yields the reply as server-sent events."""
    async with aclosing(service.generate(request)) as events:
        async for event in events:
            match event:
                case TextEvent():
                    yield sse("token", TokenData(text=event.text, logprobs=to_logprobs(request, event.logprobs)))
                case DoneEvent():
                    yield sse("done", done_data(request, event))
                case ErrorEvent():
                    detail = error_reply(*TABLE[FAILURES[event.kind]], event.message, None)
                    yield sse("error", ErrorReply.model_validate(detail))


def sse(name: str, data: BaseModel) -> bytes:
    """Returns one server-sent event."""
    return format_sse_event(event=name, data_str=data.model_dump_json())


def done_data(request: EngineRequest, event: DoneEvent) -> DoneData:
    """Returns what is known at the end."""
    num_prompt, num_completion = event.num_prompt_tokens, event.num_completion_tokens
    return DoneData(
        id=request.id,
        adapter=[ResolvedAdapter(name=t.name, version=t.version, weight=t.weight) for t in request.terms],
        finish_reason=event.finish_reason,
        usage=Usage(prompt_tokens=num_prompt, completion_tokens=num_completion, total_tokens=num_prompt + num_completion),
        seed=request.sampling.seed,
    )


def to_logprobs(request: EngineRequest, found: Sequence[TokenLogprob]) -> Logprobs | None:
    """Returns log-probabilities as they are on the wire, where the request asked for them."""
    if request.num_logprobs is None:
        return None
    return Logprobs(
        tokens=[one.token for one in found],
        token_logprobs=[one.value for one in found],
        top_logprobs=[one.top for one in found] if request.num_logprobs else None,
        text_offset=[one.text_offset for one in found],
    )
