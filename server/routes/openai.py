"""What OpenAI's routes share: bodies to what is asked for, and what was answered to their words. Translates only."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from fastapi.sse import format_sse_event

from lori.errors import UnknownAdapterError
from server.access.caller import Caller
from server.engine.adapters.registry import AmbiguousVersionError, FaultyAdapterError
from server.engine.admission import Ask, Prompt, RefusedError
from server.engine.request import DoneEvent, Request
from server.errors import FieldError
from server.model_names import NamedModel, parse_model
from server.routes.generate import to_adapters, to_merge, to_timings
from server.routes.references import explained, explained_model
from server.schemas.chat import ChatChunk
from server.schemas.completions import CompletionReply
from server.schemas.grammars import to_grammar
from server.schemas.openai import CachedTokens, FinishReason, LoriReply, OpenAIBody, OpenAIUsage
from server.service import Service

DONE = format_sse_event(data_str="[DONE]")


def to_ask(body: OpenAIBody, base_names: Collection[str], prompt: Prompt) -> Ask:
    """Return what a body asks for with one of its prompts; how long the answer may be is the route's to add.

    Raises what the error table knows, for weights that are not sound.
    """
    named = NamedModel() if body.model is None else parse_model(body.model, base_names)
    names, weights = body.to_adapters(body.adapters)
    if body.adapters is not None and named.adapters:
        raise RefusedError("adapters", f"is beside the model {body.model!r}, expected it beside the base model alone")
    if named.weights is not None and body.weights is not None:
        raise RefusedError("weights", f"is beside the weights in the model {body.model!r}, expected one of the two")
    return Ask(
        prompt=prompt,
        adapters=named.adapters or names,
        weights=named.weights or weights,
        merge=body.to_merge(),
        sampling=body.to_sampling(),
        seed=body.seed,
        stop=body.stops(),
        include_stop=body.include_stop_str_in_output,
        grammar=to_grammar(body.grammar, "grammar") or to_grammar(body.response_format, "response_format"),
        ignore_eos=body.ignore_eos,
        num_choices=body.n,
        priority=body.priority,
        timeout_s=body.timeout_s,
    )


@contextmanager
def in_fields_of(body: OpenAIBody, service: Service, caller: Caller) -> Iterator[None]:
    """Raise what is wrong with adapters as what is wrong with the field of `body` that names them."""
    is_model = body.adapters is None and body.model is not None
    try:
        yield
    except UnknownAdapterError as error:
        if is_model:
            raise explained_model(service, caller, body.model or "", error) from error
        raise FieldError("adapters", explained(service, caller, error, "adapters")) from error
    except (AmbiguousVersionError, FaultyAdapterError) as error:
        raise FieldError("model" if is_model else "adapters", error) from error
    except RefusedError as error:
        if error.field != "adapter":
            raise
        raise RefusedError("model" if is_model else "adapters", error.message) from error


def finish_reason(done: DoneEvent) -> FinishReason:
    """Return why an answer ended, as OpenAI says it."""
    return "length" if done.finish_reason == "length" else "stop"


def to_usage(done: Sequence[Sequence[DoneEvent]]) -> OpenAIUsage:
    """Return what several requests cost, each with its choices, which have one prompt."""
    num_prompt = sum(of_request[0].num_prompt_tokens for of_request in done)
    num_completion = sum(event.num_completion_tokens for of_request in done for event in of_request)
    return OpenAIUsage(
        prompt_tokens=num_prompt,
        completion_tokens=num_completion,
        total_tokens=num_prompt + num_completion,
        prompt_tokens_details=CachedTokens(cached_tokens=sum(of_request[0].num_cached_tokens for of_request in done)),
    )


def to_lori(request: Request, done: DoneEvent | None) -> LoriReply:
    """Return what OpenAI's replies do not say."""
    return LoriReply(
        adapter=to_adapters(request),
        merge=to_merge(request),
        template=request.template,
        seed=request.sampling.seed,
        timings=to_timings(done.timings) if done else None,
    )


def sse(part: ChatChunk | CompletionReply, *, has_usage: bool) -> bytes:
    """Return the server-sent event of a part of an answer; `usage` is in each or in none, as OpenAI has it."""
    left_out = {name for name, value in (("usage", has_usage), ("lori", part.lori)) if not value}
    return format_sse_event(data_str=part.model_dump_json(exclude=left_out))
