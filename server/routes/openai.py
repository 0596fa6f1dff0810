"""Conversions that OpenAI's routes share: bodies to engine requests, and answers to OpenAI's form. Only translates."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from fastapi.sse import format_sse_event

from lori.errors import UnknownAdapterError
from server.access.caller import Caller
from server.engine.adapters.registry import AmbiguousVersionError, FaultyAdapterError
from server.engine.generate_request import GenerateRequest, Prompt, RefusedError
from server.engine.request import DoneEvent, Request
from server.errors import FieldError, IncompleteMergeError
from server.routes.generate import shared_request, to_adapters, to_merge, to_timings
from server.routes.references import explained_adapter, explained_model
from server.schemas.chat import ChatChunk
from server.schemas.completions import CompletionReply
from server.schemas.model_names import NamedModel, parse_model
from server.schemas.openai import CachedTokens, FinishReason, LoriReply, OpenAIBody, OpenAIUsage
from server.service.service import Service

DONE = format_sse_event(data_str="[DONE]")


def openai_request(body: OpenAIBody, base_names: Collection[str], prompt: Prompt) -> GenerateRequest:
    """Return the engine's request for a body and one of its prompts, without the length of the answer, which the route adds.

    Raises errors of the error table if the weights are not sound.
    """
    named = NamedModel() if body.model is None else parse_model(body.model, base_names)
    names, weights = body.to_adapters(body.adapters)
    if body.adapters is not None and named.adapters:
        raise RefusedError("adapters", f"is beside the model {body.model!r}, expected it beside the base model alone")
    if named.weights is not None and body.weights is not None:
        raise RefusedError("weights", f"is beside the weights in the model {body.model!r}, expected one of the two")
    request = shared_request(body, prompt, named.adapters or names, named.weights or weights)
    return replace(request, weights_field="adapter") if named.adapters and body.weights is None else request


@contextmanager
def errors_in_fields_of(body: OpenAIBody, service: Service, caller: Caller) -> Iterator[None]:
    """Attribute errors about adapters in the block to the field of `body` that names the adapters."""
    is_model = body.adapters is None and body.model is not None
    try:
        yield
    except UnknownAdapterError as error:
        if is_model:
            raise explained_model(service, caller, body.model or "", error) from error
        raise FieldError("adapters", explained_adapter(service, caller, error, "adapters")) from error
    except (AmbiguousVersionError, FaultyAdapterError, IncompleteMergeError) as error:
        raise FieldError("model" if is_model else "adapters", error) from error
    except RefusedError as error:
        if error.field != "adapter":
            raise
        raise RefusedError("model" if is_model else "adapters", error.message) from error


def finish_reason(done: DoneEvent) -> FinishReason:
    """Return the reason for the end of an answer, in OpenAI's terms."""
    return "length" if done.finish_reason == "length" else "stop"


def to_usage(done: Sequence[Sequence[DoneEvent]]) -> OpenAIUsage:
    """Return the usage of several requests, each with its choices, which share one prompt."""
    num_prompt = sum(events[0].num_prompt_tokens for events in done)
    num_completion = sum(event.num_completion_tokens for events in done for event in events)
    return OpenAIUsage(
        prompt_tokens=num_prompt,
        completion_tokens=num_completion,
        total_tokens=num_prompt + num_completion,
        prompt_tokens_details=CachedTokens(cached_tokens=sum(events[0].num_cached_tokens for events in done)),
    )


def to_lori(request: Request, done: DoneEvent | None) -> LoriReply:
    """Return the values that OpenAI's replies lack."""
    return LoriReply(
        adapter=to_adapters(request),
        merge=to_merge(request),
        template=request.template,
        seed=request.sampling.seed,
        timings=to_timings(done.timings) if done else None,
    )


def sse(part: ChatChunk | CompletionReply, *, has_usage: bool) -> bytes:
    """Return the server-sent event of a part of an answer. As at OpenAI, either all parts have `usage` or none."""
    left_out = {name for name, value in (("usage", has_usage), ("lori", part.lori)) if not value}
    return format_sse_event(data_str=part.model_dump_json(exclude=left_out))
