"""POST /v1/chat/completions. Only translates."""

import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from fastapi.sse import format_sse_event

from server.description.responses import streams
from server.engine.generate_request import GenerateRequest
from server.engine.request import DoneEvent, ErrorEvent, Request, TextEvent, TokenLogprob
from server.engine.text import REPLACEMENT_CHARACTER
from server.errors import failure_reply
from server.routes.dependencies import CallerOf, ServiceOf
from server.routes.event_stream import EventStream
from server.routes.json_route import JsonRoute, json_reply
from server.routes.openai import DONE, errors_in_fields_of, finish_reason, openai_request, sse, to_lori, to_usage
from server.schemas.chat import (
    AnswerMessage,
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatReply,
    Delta,
    TokenLogprobReply,
    TopLogprob,
)
from server.schemas.errors import ErrorReply
from server.service.answers import Answer, collect, until_disconnect
from server.service.service import Service

router = APIRouter(route_class=JsonRoute)
STREAM = streams(
    'data: {"id":"chatcmpl-gen-53ad4e5b230e22f6","object":"chat.completion.chunk",…}\n\ndata: [DONE]\n\n',
    ("", ChatChunk),
    ("", ErrorReply),
)


@router.post("/v1/chat/completions", response_model=ChatReply, responses=STREAM)
async def chat_completions(body: ChatBody, http: HttpRequest, service: ServiceOf, caller: CallerOf) -> Response:
    """Answer a conversation, as OpenAI's and vLLM's servers do; `model` names the adapters."""
    async with AsyncExitStack() as place:
        with errors_in_fields_of(body, service, caller):
            sent = to_request(body, service.base_names)
            admitted = service.admitted([sent], caller, is_whole=not body.stream, has_left=http.is_disconnected)
            [request] = await place.enter_async_context(admitted)
        writer = _Writer(body, service, request)
        if body.stream:
            return EventStream(writer.stream(service), place.pop_all(), service.settings.max_unread_s)
        answers = await until_disconnect(http, collect(service, request))
    return Response(status_code=499) if answers is None else await json_reply(lambda: writer.whole(answers))


def to_request(body: ChatBody, base_names: Collection[str]) -> GenerateRequest:
    """Return the engine's request for a body."""
    return replace(
        openai_request(body, base_names, [message.to_message() for message in body.messages]),
        template=body.template,
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        default_max_tokens=None,
    )


class _Writer:
    """Writer of the reply to one body."""

    def __init__(self, body: ChatBody, service: Service, request: Request) -> None:
        self._request = request
        self._model = service.base_model if body.model is None else body.model
        self._fingerprint = service.fingerprint
        self._id, self._created = f"chatcmpl-{request.id}", int(time.time())
        self._has_usage = body.stream_options is not None and body.stream_options.include_usage

    def whole(self, answers: Sequence[Answer]) -> ChatReply:
        """Return the reply."""
        return ChatReply(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=[
                ChatChoice(
                    index=index,
                    message=AnswerMessage(content=answer.text),
                    logprobs=self._to_logprobs(answer.logprobs),
                    finish_reason=finish_reason(answer.done),
                )
                for index, answer in enumerate(answers)
            ],
            usage=to_usage([[answer.done for answer in answers]]),
            lori=to_lori(self._request, answers[0].done),
        )

    async def stream(self, service: Service) -> AsyncGenerator[bytes, None]:
        """Yield the reply as server-sent events."""
        for index in range(self._request.sampling.num_choices):
            yield self._sse(self._chunk(ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))))
        done: list[DoneEvent] = []
        async with aclosing(service.generate(self._request)) as events:
            async for event in events:
                match event:
                    case TextEvent():
                        if event.text or event.logprobs:  # otherwise a partial character is held back
                            delta, logprobs = Delta(content=event.text), self._to_logprobs(event.logprobs)
                            yield self._sse(self._chunk(ChatChunkChoice(index=event.choice, delta=delta, logprobs=logprobs)))
                    case DoneEvent():
                        done.append(event)
                        choice = ChatChunkChoice(index=event.choice, delta=Delta(), finish_reason=finish_reason(event))
                        chunk = self._chunk(choice)
                        chunk.lori = to_lori(self._request, event)
                        yield self._sse(chunk)
                    case ErrorEvent():
                        yield format_sse_event(data_str=failure_reply(event).model_dump_json())
                        return
        if self._has_usage:
            last = self._chunk()
            last.usage = to_usage([done])
            yield self._sse(last)
        yield DONE

    def _chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=list(choices),
        )

    def _sse(self, chunk: ChatChunk) -> bytes:
        return sse(chunk, has_usage=self._has_usage)

    def _to_logprobs(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if self._request.sampling.num_logprobs is None:
            return None
        return ChatLogprobs(content=[_to_logprob(token) for token in tokens])


def _to_logprob(token: TokenLogprob) -> TokenLogprobReply:
    assert token.value is not None, "an answer's tokens are all predicted"
    top = [TopLogprob(token=text, logprob=value, bytes=_bytes(text)) for text, value in token.top.items()]
    return TokenLogprobReply(token=token.token, logprob=token.value, bytes=_bytes(token.token), top_logprobs=top)


def _bytes(token: str) -> list[int] | None:
    return None if REPLACEMENT_CHARACTER in token else list(token.encode())
