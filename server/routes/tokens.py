"""POST /tokenize and /detokenize, in vLLM's form. Only translates."""

from collections.abc import Callable, Sequence

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from lori.names import AUTO
from lori.summary import Summary
from lori.template import Message
from server.access.caller import Caller
from server.engine.generate_request import RefusedError, prompt_size
from server.routes.dependencies import CallerOf, ServiceOf
from server.routes.json_route import JsonRoute
from server.routes.references import find_model
from server.routes.token_texts import text_of, token_ids, token_texts
from server.schemas.model_names import parse_model
from server.schemas.tokens import DetokenizeBody, DetokenizeReply, TokenizeBody, TokenizeReply
from server.service.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", response_model=TokenizeReply)
async def tokenize(body: TokenizeBody, service: ServiceOf, caller: CallerOf) -> Response:
    """Return the tokens of a text or of a conversation."""
    prompt = _prompt(body)

    if _is_auto(body.model, service) and body.messages is not None and body.template is None:
        raise RefusedError("template", f"is absent, and the adapters of the model {AUTO!r} decide it, expected one here")

    def reply(adapters: Sequence[Summary]) -> TokenizeReply:
        admission = service.admission
        template = None if body.messages is None else body.template or admission.template_of(adapters)
        ids = token_ids(admission.tokenizer, prompt, admission.countable, template, add_special_tokens=body.add_special_tokens)
        return TokenizeReply(
            count=len(ids),
            max_model_len=admission.max_context,
            tokens=ids,
            template=template,
            token_strs=token_texts(admission.tokenizer, ids) if body.return_token_strs else None,
        )

    return await _answer(body.model, service, caller, reply, prompt_size(prompt))


@router.post("/detokenize", response_model=DetokenizeReply)
async def detokenize(body: DetokenizeBody, service: ServiceOf, caller: CallerOf) -> Response:
    """Return the text of tokens."""
    tokenizer = service.admission.tokenizer
    return await _answer(
        body.model, service, caller, lambda _: DetokenizeReply(prompt=text_of(tokenizer, body.tokens)), len(body.tokens)
    )


async def _answer(
    model: str | None, service: Service, caller: Caller, reply: Callable[[Sequence[Summary]], BaseModel], size: int
) -> Response:
    # For long texts: each counts as a request of its tenant, and its reply is made and written off the event loop.
    with service.limiter.places(caller):
        adapters = await _adapters_of(model, service, caller)
        content = await service.texts.run(lambda: reply(adapters).model_dump_json(), caller.tenant, size)
        return Response(content, media_type="application/json")


def _prompt(body: TokenizeBody) -> str | Sequence[Message]:
    prompt = body.prompt if body.messages is None else [message.to_message() for message in body.messages]
    assert prompt is not None
    return prompt


def _is_auto(model: str | None, service: Service) -> bool:
    return model is not None and parse_model(model, service.base_names).adapters == (AUTO,)


async def _adapters_of(model: str | None, service: Service, caller: Caller) -> list[Summary]:
    if model is None or _is_auto(model, service):  # all adapters have one tokenizer
        return []
    adapters = await find_model(service, caller, model, parse_model(model, service.base_names).adapters)
    return [registered.summary for registered in adapters]
