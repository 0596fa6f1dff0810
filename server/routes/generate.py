"""POST /generate: this server's own route. Only translates."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.sse import format_sse_event
from pydantic import BaseModel

from lori.errors import UnknownAdapterError
from lori.template import Template
from server.description.responses import streams
from server.engine.generate_request import GenerateRequest, Prompt, TokenPrompt
from server.engine.request import DoneEvent, ErrorEvent, RequestedWeights, TextEvent, Timings, TokenLogprob
from server.engine.request import Request as EngineRequest
from server.errors import failure_reply
from server.routes.dependencies import CallerOf, ServiceOf
from server.routes.event_stream import EventStream
from server.routes.json_route import JsonRoute, json_reply
from server.routes.references import explained_adapter
from server.schemas.errors import ErrorReply
from server.schemas.generation import (
    ChoiceReply,
    DoneData,
    GenerateBody,
    GenerateReply,
    Logprobs,
    MergeReply,
    ResolvedAdapter,
    TimingsReply,
    TokenData,
    Usage,
)
from server.schemas.openai import OpenAIBody
from server.service.answers import Answer, collect, until_disconnect
from server.service.service import Service

router = APIRouter(route_class=JsonRoute)
STREAM = streams(
    'event: token\ndata: {"text":" card","index":0,"logprobs":null}\n\n'
    'event: done\ndata: {"id":"gen-53ad4e5b230e22f6","index":0,"adapter":[],"merge":null,"finish_reason":"length",…}\n\n',
    ("token", TokenData),
    ("done", DoneData),
    ("error", ErrorReply),
)


@router.post("/generate", response_model=GenerateReply, responses=STREAM)
async def generate(body: GenerateBody, http: Request, service: ServiceOf, caller: CallerOf) -> Response:
    """Continue a prompt or answer messages, with any adapters of the server added together."""
    async with AsyncExitStack() as place:
        admitted = service.admitted([to_request(body)], caller, is_whole=not body.stream, has_left=http.is_disconnected)
        try:
            [request] = await place.enter_async_context(admitted)
        except UnknownAdapterError as error:
            raise explained_adapter(service, caller, error, "adapter") from error
        if body.stream:
            return EventStream(stream(service, request), place.pop_all(), service.settings.max_unread_s)
        answers = await until_disconnect(http, collect(service, request))
    # The client has gone; 499 is the status that proxies log.
    return (
        Response(status_code=499)
        if answers is None
        else await json_reply(lambda: to_reply(request, answers, service.fingerprint))
    )


def to_request(body: GenerateBody) -> GenerateRequest:
    """Return the engine's request for a body."""
    names, weights = body.to_adapters(body.adapter)
    return shared_request(body, _to_prompt(body), names, weights, template=body.template, max_tokens=body.max_tokens)


def shared_request(
    body: GenerateBody | OpenAIBody,
    prompt: Prompt,
    adapters: tuple[str, ...],
    weights: RequestedWeights,
    *,
    template: Template | None = None,
    max_tokens: int | None = None,
) -> GenerateRequest:
    """Return the engine's request for a body of any route. The arguments are the fields that routes have in other forms."""
    return GenerateRequest(
        prompt=prompt,
        template=template,
        max_tokens=max_tokens,
        adapters=adapters,
        weights=weights,
        weights_field="adapter" if weights is not None and body.weights is None else "weights",
        merge=body.to_merge(),
        sampling=body.to_sampling(),
        priority=body.priority,
        timeout_s=body.timeout_s,
    )


def _to_prompt(body: GenerateBody) -> Prompt:
    if isinstance(body.prompt, list):
        return TokenPrompt(tuple(body.prompt))
    prompt = body.prompt if body.messages is None else body.messages
    assert prompt is not None
    return prompt


def to_reply(request: EngineRequest, answers: Sequence[Answer], fingerprint: str) -> GenerateReply:
    """Return the whole reply."""
    choices = [
        ChoiceReply(
            index=index,
            text=answer.text,
            finish_reason=answer.done.finish_reason,
            logprobs=to_logprobs(request, answer.logprobs),
        )
        for index, answer in enumerate(answers)
    ]
    first = choices[0]
    return GenerateReply(
        id=request.id,
        text=first.text,
        adapter=to_adapters(request),
        merge=to_merge(request),
        template=request.template,
        finish_reason=first.finish_reason,
        usage=to_usage([answer.done for answer in answers]),
        timings=to_timings(answers[0].done.timings),
        seed=request.sampling.seed,
        system_fingerprint=fingerprint,
        logprobs=first.logprobs,
        choices=choices if len(choices) > 1 else None,
    )


async def stream(service: Service, request: EngineRequest) -> AsyncGenerator[bytes, None]:
    """Yield the reply as server-sent events."""
    async with aclosing(service.generate(request)) as events:
        async for event in events:
            match event:
                case TextEvent():
                    logprobs = to_logprobs(request, event.logprobs)
                    yield sse("token", TokenData(text=event.text, index=event.choice, logprobs=logprobs))
                case DoneEvent():
                    yield sse("done", to_done(request, event, service.fingerprint))
                case ErrorEvent():
                    yield sse("error", failure_reply(event))


def sse(name: str, data: BaseModel) -> bytes:
    """Return one server-sent event."""
    return format_sse_event(event=name, data_str=data.model_dump_json())


def to_done(request: EngineRequest, event: DoneEvent, fingerprint: str) -> DoneData:
    """Return the data of a `done` event."""
    return DoneData(
        id=request.id,
        index=event.choice,
        adapter=to_adapters(request),
        merge=to_merge(request),
        template=request.template,
        finish_reason=event.finish_reason,
        usage=to_usage([event]),
        timings=to_timings(event.timings),
        seed=request.sampling.seed,
        system_fingerprint=fingerprint,
    )


def to_adapters(request: EngineRequest) -> list[ResolvedAdapter]:
    """Return the adapters of a request, and those that the operator adds."""
    requested, fixed = ((request.terms, False), (request.policy, True))
    return [
        ResolvedAdapter(
            name=term.name,
            version=term.version,
            weight=term.weight,
            block_weights=[*term.block_weights],
            policy=is_policy,
        )
        for terms, is_policy in (requested, fixed)
        for term in terms
    ]


def to_merge(request: EngineRequest) -> MergeReply | None:
    """Return the merge of a request's adapters."""
    if not request.terms and not request.policy and request.base_share is None:
        return None
    return MergeReply.model_validate({**request.merge.used, "base_share": request.base_share})


def to_usage(done: Sequence[DoneEvent]) -> Usage:
    """Return the usage of one request. Its choices share one prompt."""
    num_prompt, num_completion = done[0].num_prompt_tokens, sum(event.num_completion_tokens for event in done)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_completion,
        total_tokens=num_prompt + num_completion,
        cached_tokens=done[0].num_cached_tokens,
    )


def to_timings(timings: Timings) -> TimingsReply:
    """Return the timings in the form of the wire."""
    return TimingsReply(
        queue_s=timings.queue,
        prefill_s=timings.prefill,
        decode_s=timings.decode,
        time_to_first_token_s=timings.first_token,
        total_s=timings.total,
    )


def to_logprobs(request: EngineRequest, tokens: Sequence[TokenLogprob]) -> Logprobs | None:
    """Return the log-probabilities in the form of the wire; None if the request did not ask for them."""
    if request.sampling.num_logprobs is None:
        return None
    return Logprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[token.value for token in tokens],
        top_logprobs=[token.top for token in tokens] if request.sampling.num_logprobs else None,
        text_offset=[token.text_offset for token in tokens],
    )
