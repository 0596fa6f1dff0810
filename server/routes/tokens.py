"""POST /tokenize and /detokenize, in vLLM's form. Translates only."""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool

from lori.errors import UnknownAdapterError
from server.engine.adapters.resolution import resolve
from server.model_names import UnknownModelError, parse_model
from server.routes.dependencies import get_service
from server.schemas.tokens import DetokenizeBody, DetokenizeReply, TokenizeBody, TokenizeReply
from server.service import Service
from server.token_texts import text_of, token_ids, token_texts

router = APIRouter()
ServiceOf = Annotated[Service, Depends(get_service)]


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, service: ServiceOf) -> TokenizeReply:
    """Returns the tokens of a text or of a conversation."""
    _check_model(body.model, service)
    return await run_in_threadpool(_tokenize, body, service)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, service: ServiceOf) -> DetokenizeReply:
    """Returns the text of tokens."""
    _check_model(body.model, service)
    return DetokenizeReply(prompt=await run_in_threadpool(text_of, service.admission.tokenizer, body.tokens))


def _tokenize(body: TokenizeBody, service: Service) -> TokenizeReply:
    tokenizer = service.admission.tokenizer
    prompt = body.prompt if body.messages is None else [message.to_message() for message in body.messages]
    assert prompt is not None
    ids = token_ids(tokenizer, prompt, add_special_tokens=body.add_special_tokens)
    return TokenizeReply(
        count=len(ids),
        max_model_len=service.admission.max_context,
        tokens=ids,
        token_strs=token_texts(tokenizer, ids) if body.return_token_strs else None,
    )


def _check_model(model: str | None, service: Service) -> None:
    if model is None:
        return
    for reference in parse_model(model, service.base_model).adapters:
        try:
            resolve(service.registry, reference, lambda _: True)
        except UnknownAdapterError as error:
            raise UnknownModelError(model) from error
