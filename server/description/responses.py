"""Responses of routes besides their replies, for the API's description: refusals, failures, streams."""

from typing import Any

from pydantic import BaseModel

from server.schemas.errors import ErrorReply, error_reply

Responses = dict[int | str, dict[str, Any]]
RETRY_AFTER = {"Retry-After": {"description": "In how many seconds to try again", "schema": {"type": "integer", "minimum": 0}}}
REFUSALS: dict[int, tuple[str, str, str, str | None]] = {
    400: (
        "The request is not sound: which field, what was found, what was expected",
        "BadRequestError",
        "prompt: expected text, or a list of token ids, found 5",
        "prompt",
    ),
    401: ("No key, or none that is known", "AuthenticationError", "the key is not known", None),
    403: ("The key's role does not allow it", "PermissionDeniedError", "this route needs a key of the role 'admin'", None),
    404: (
        "There is nothing of this name that the key may use",
        "NotFoundError",
        "there is no adapter 'maths': did you mean 'math'?",
        "adapter",
    ),
    408: (
        "The body did not come in time",
        "TimeoutError",
        "the body did not come whole within 60 s (--max-body-s) and a second for each 131072 bytes",
        None,
    ),
    409: (
        "What there is does not let it happen",
        "ConflictError",
        "math is an alias: an adapter of its own cannot be called so",
        "name",
    ),
    413: ("The body is too long", "BadRequestError", "the body is longer than 1048576 bytes (--max-body-bytes)", None),
    415: ("The body is of another kind", "BadRequestError", "Content-Type is 'text/plain', expected application/json", None),
    421: (
        "The request is for a name that the server does not go by",
        "BadRequestError",
        "Host is 'page.example', expected localhost, an IP address, or a name that the server is started with (--allow-host): "
        "without keys it answers to no other",
        None,
    ),
    422: ("An answer cannot follow the grammar any further", "GrammarError", "the grammar could be followed no further", None),
    429: ("Too many requests, of the key's tenant or of all", "RateLimitError", "1024 requests are under way; try again", None),
    500: ("The server failed, or an adapter did", "InternalServerError", "the server failed; its log says why", None),
    503: ("The engine is not running", "ServiceUnavailableError", "the engine is not running", None),
    504: ("The answer was not done within `timeout_s`", "TimeoutError", "not done within 30 s", None),
}
"""By status: its description, and the type, the message and the field of an example."""
GENERATING = (400, 404, 408, 413, 422, 429, 503, 504)
"""Statuses of routes that generate."""
ADMINISTERING = (400, 403, 404, 408, 409, 413, 429, 503)
"""Statuses of routes that change adapters."""


def refusals(*statuses: int) -> Responses:
    """Return the descriptions of statuses whose body is an error."""
    return {status: _refusal(status) for status in statuses}


def _refusal(status: int) -> dict[str, Any]:
    description, *_ = REFUSALS[status]
    response: dict[str, Any] = {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": reference(ErrorReply)}}},
    }
    return response | {"headers": RETRY_AFTER} if status in (429, 503) else response


def refusal_example(status: int) -> dict[str, Any]:
    """Return an example of an error with this status."""
    _, kind, message, param = REFUSALS[status]
    return error_reply(status, kind, message, param)


def reference(model: type[BaseModel]) -> str:
    """Return the reference to a schema in the description."""
    return f"#/components/schemas/{model.__name__}"


def streams(example: str, *events: tuple[str, type[BaseModel]]) -> Responses:
    """Return the description of a stream of `events`, each a name and its data.

    Without names, the events are OpenAI's, and `[DONE]` comes at the end.
    """
    items = [_event(name, model) for name, model in events]
    if not events[0][0]:
        items.append({"type": "object", "required": ["data"], "properties": {"data": {"const": "[DONE]"}}})
    content = {"itemSchema": {"oneOf": items}, "example": example}
    return {200: {"description": "The whole reply, or with `stream` its events", "content": {"text/event-stream": content}}}


def _event(name: str, model: type[BaseModel]) -> dict[str, Any]:
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"$ref": reference(model)}}
    named = {"event": {"const": name}} if name else {}
    return {"type": "object", "required": [*named, "data"], "properties": {**named, "data": data}}
