"""Requests of both clients, and the types of their replies. Knows no connection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from server.affinity import ANY, adapter_names, key_of
from server.client.errors import UnexpectedReplyError
from server.client.fields import GenerateFields, MessageFields
from server.schemas.generation import GenerateReply, Health
from server.schemas.tokens import DetokenizeReply, TokenizeReply

Reply = TypeVar("Reply", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Call(Generic[Reply]):
    """One request of the client."""

    method: str
    path: str
    reply: type[Reply]
    body: Mapping[str, object] | None = None
    """The JSON body; with `files`, the fields of the form."""
    params: Mapping[str, str] | None = None
    files: Mapping[str, bytes] | None = None
    headers: Mapping[str, str] | None = None
    is_repeatable: bool = True
    """Whether the call has the same effect if it is made twice. It may then be repeated if the client does not know whether it
    arrived."""

    def to_request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """Return the request for the client `http`."""
        if self.files is None:
            return http.build_request(self.method, self.path, json=self.body, params=self.params, headers=self.headers)
        return http.build_request(self.method, self.path, data={**(self.body or {})}, files={**self.files})

    def read(self, content: bytes) -> Reply:
        """Return the reply. Raises `UnexpectedReplyError`."""
        return parsed(self.reply, content)


def parsed(kind: type[Reply], content: bytes) -> Reply:
    """Return the reply of type `kind` from JSON. Raises `UnexpectedReplyError` if it is something else."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise UnexpectedReplyError(f"expected {kind.__name__}, found {error}") from error


def generate(fields: GenerateFields, affinity_header: str | None) -> Call[GenerateReply]:
    """Request a whole answer."""
    return Call("POST", "/generate", GenerateReply, {**fields}, headers=affinity(fields, affinity_header))


def stream(fields: GenerateFields, affinity_header: str | None) -> Call[GenerateReply]:
    """Request an answer as a stream."""
    body = {**fields, "stream": True}
    return Call("POST", "/generate", GenerateReply, body, headers=affinity(fields, affinity_header))


def affinity(fields: GenerateFields, header: str | None) -> Mapping[str, str] | None:
    """Return the affinity header of a request that names adapters: their names, sorted, as `math+safety`."""
    key = key_of(adapter_names(fields, ""))
    return {header: quote(key, safe="+")} if header and key != ANY else None


def tokenize(
    text_or_messages: str | Sequence[MessageFields], *, add_special_tokens: bool, return_token_strs: bool
) -> Call[TokenizeReply]:
    """Request the tokens of a text, or of a conversation."""
    body = {
        "prompt" if isinstance(text_or_messages, str) else "messages": text_or_messages,
        "add_special_tokens": add_special_tokens,
        "return_token_strs": return_token_strs,
    }
    return Call("POST", "/tokenize", TokenizeReply, body)


def detokenize(tokens: Sequence[int]) -> Call[DetokenizeReply]:
    """Request the text of tokens."""
    return Call("POST", "/detokenize", DetokenizeReply, {"tokens": tokens})


def health() -> Call[Health]:
    """Request whether the process answers."""
    return Call("GET", "/health", Health)


def ready() -> Call[Health]:
    """Request whether the server can answer requests."""
    return Call("GET", "/ready", Health)
