"""POST /v1/completions. Only translates."""

import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from fastapi.sse import format_sse_event

from server.description.responses import streams
from server.engine.generate_request import GenerateRequest, Prompt, TokenPrompt
from server.engine.request import DoneEvent, ErrorEvent, Request, TextEvent, TokenLogprob
from server.errors import failure_reply
from server.routes.dependencies import CallerOf, ServiceOf
from server.routes.event_stream import EventStream
from server.routes.generate import to_logprobs
from server.routes.json_route import JsonRoute, json_reply
from server.routes.openai import DONE, errors_in_fields_of, finish_reason, openai_request, sse, to_lori, to_usage
from server.schemas.completions import CompletionBody, CompletionChoice, CompletionReply
from server.schemas.errors import ErrorReply
from server.schemas.generation import Logprobs
from server.service.answers import Answer, collect_all, interleaved, until_disconnect
from server.service.service import Service

router = APIRouter(route_class=JsonRoute)
STREAM = streams(
    'data: {"id":"cmpl-gen-53ad4e5b230e22f6","object":"text_completion",…}\n\ndata: [DONE]\n\n',
    ("", CompletionReply),
    ("", ErrorReply),
)


@router.post("/v1/completions", response_model=CompletionReply, responses=STREAM)
async def completions(body: CompletionBody, http: HttpRequest, service: ServiceOf, caller: CallerOf) -> Response:
    """Continue prompts, as OpenAI's and vLLM's servers do; `model` names the adapters."""
    async with AsyncExitStack() as places:
        with errors_in_fields_of(body, service, caller):
            sent = to_requests(body, service.base_names)
            admitted = service.admitted(sent, caller, is_whole=not body.stream, has_left=http.is_disconnected)
            requests = await places.enter_async_context(admitted)
        writer = _Writer(body, service, requests)
        if body.stream:
            return EventStream(writer.stream(service), places.pop_all(), service.settings.max_unread_s)
        answers = await until_disconnect(http, collect_all(service, requests))
    return Response(status_code=499) if answers is None else await json_reply(lambda: writer.whole(answers))


def to_requests(body: CompletionBody, base_names: Collection[str]) -> list[GenerateRequest]:
    """Return the engine's request for each prompt of a body."""
    prompts = _to_prompts(body)
    first = replace(
        openai_request(body, base_names, prompts[0]),
        max_tokens=body.max_tokens if "max_tokens" in body.model_fields_set else None,
        default_max_tokens=body.max_tokens,
    )
    # The reply has one seed. Each prompt gets its own, because equal seeds draw alike, and equal prompts are sent to get
    # different answers.
    seeds = [(first.sampling.seed + index) % 2**63 for index in range(len(prompts))]
    return [
        replace(first, prompt=prompt, sampling=replace(first.sampling, seed=seed))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def _to_prompts(body: CompletionBody) -> list[Prompt]:
    if isinstance(body.prompt, str):
        return [body.prompt]
    if ids := [token for token in body.prompt if isinstance(token, int)]:
        return [TokenPrompt(tuple(ids))]
    return [
        prompt if isinstance(prompt, str) else TokenPrompt(tuple(prompt)) for prompt in body.prompt if not isinstance(prompt, int)
    ]


class _Writer:
    """Writer of the reply to one body. The choices of all its requests are numbered consecutively."""

    def __init__(self, body: CompletionBody, service: Service, requests: Sequence[Request]) -> None:
        self._body, self._requests = body, requests
        self._model = service.base_model if body.model is None else body.model
        self._fingerprint = service.fingerprint
        self._id, self._created = f"cmpl-{requests[0].id}", int(time.time())
        self._has_usage = body.stream_options is not None and body.stream_options.include_usage

    def whole(self, answers: Sequence[Sequence[Answer]]) -> CompletionReply:
        """Return the reply."""
        pairs = [
            (request, answer)
            for request, choice_answers in zip(self._requests, answers, strict=True)
            for answer in choice_answers
        ]
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=_to_logprobs(request, answer.logprobs),
                finish_reason=finish_reason(answer.done),
                lori=to_lori(request, answer.done) if len(answers) > 1 else None,
            )
            for index, (request, answer) in enumerate(pairs)
        ]
        reply = self._part(choices)
        reply.usage = to_usage([[answer.done for answer in choice_answers] for choice_answers in answers])
        reply.lori = to_lori(self._requests[0], answers[0][0].done)
        return reply

    async def stream(self, service: Service) -> AsyncGenerator[bytes, None]:
        """Yield the reply as server-sent events."""
        done: list[list[DoneEvent]] = [[] for _ in self._requests]
        async with aclosing(interleaved(service, self._requests)) as events:
            async for position, event in events:
                request = self._requests[position]
                match event:
                    case TextEvent():
                        if event.text or event.logprobs:  # otherwise a partial character is held back
                            logprobs = _to_logprobs(request, event.logprobs)
                            choice = CompletionChoice(
                                index=self._index(position, event.choice), text=event.text, logprobs=logprobs
                            )
                            yield self._sse(self._part([choice]))
                    case DoneEvent():
                        done[position].append(event)
                        index, reason = self._index(position, event.choice), finish_reason(event)
                        part = self._part([CompletionChoice(index=index, text="", finish_reason=reason)])
                        part.lori = to_lori(request, event)
                        yield self._sse(part)
                    case ErrorEvent():
                        yield format_sse_event(data_str=failure_reply(event).model_dump_json())
                        return
        if self._has_usage:
            last = self._part([])
            last.usage = to_usage(done)
            yield self._sse(last)
        yield DONE

    def _index(self, position: int, choice: int) -> int:
        return position * self._body.n + choice

    def _part(self, choices: list[CompletionChoice]) -> CompletionReply:
        return CompletionReply(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
        )

    def _sse(self, part: CompletionReply) -> bytes:
        return sse(part, has_usage=self._has_usage)


def _to_logprobs(request: Request, tokens: Sequence[TokenLogprob]) -> Logprobs | None:
    # As in vLLM, the alternatives include the token itself.
    logprobs = to_logprobs(request, tokens)
    if logprobs:
        logprobs.top_logprobs = [
            token.top if token.value is None else {**token.top, token.token: token.value} for token in tokens
        ]
    return logprobs
