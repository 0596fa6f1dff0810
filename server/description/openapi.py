"""The API's description at /openapi.json, and the methods of a path (RFC 9110, section 15.5.6).

Knows the wire, but no handler.
"""

import re
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.routing import Match
from starlette.types import Lifespan

from server.access.gate import is_open
from server.description.examples import REPLIES
from server.description.responses import Responses, refusal_example, refusals
from server.schemas.chat import ChatChunk
from server.schemas.errors import ErrorReply
from server.schemas.generation import DoneData, TokenData

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def allowed_methods(request: Request) -> list[str]:
    """Return the methods of the request's path.

    The framework only knows those of one route, and a path can have several routes.
    """
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    return [
        method for method, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]


DESCRIPTION = """
A generation request names the adapters that answer it, with or without weights, or none for the base model. The server adds their
deltas inside the batch.

- **Errors** are `{"error": {"message", "type", "param", "code"}}`, with the status as `code` and the field at fault as `param`. A
  request that is not valid is refused before the first byte of its answer. A failure after that ends a stream with an `error`
  event.
- **Bodies** are JSON (RFC 8259, UTF-8). Unknown fields, duplicate fields and values of another type are errors.
- **Streams** are server-sent events. Lines that begin with a colon are comments; they keep the connection open.
- **OpenAI's clients** work unchanged: `model` is the base model, an adapter, or several adapters, such as `math:1+safety:0.8`.
"""
TAGS = (
    ("generate", "Generation with any adapters, merged in the request."),
    ("openai", "Generation by the routes of OpenAI's API, with vLLM's additional fields."),
    ("tokens", "Conversion of text to tokens and back."),
    ("adapters", "The adapters: list, compare, upload, change. Changes need an admin's key."),
    ("operations", "Health checks for orchestrators, and metrics for Prometheus."),
)
REQUEST_ID = {"description": "The request's own X-Request-ID, or a new one. The log has it, too.", "schema": {"type": "string"}}
EVENTS = (TokenData, DoneData, ChatChunk, ErrorReply)
"""Events of streams, which FastAPI does not see."""
KEY = "key"
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
CODE = re.compile("`([^`]+)`")
FASTAPI_ERROR = "HTTPValidationError"
"""FastAPI's answer to a body that is not sound, which is 400 here."""


class Api(FastAPI):
    """The FastAPI application, with its description."""

    def __init__(self, lifespan: Lifespan[Any], *, has_keys: bool) -> None:
        super().__init__(
            title="lori-server",
            version=version("lori-server"),
            summary="One base model, many LoRI adapters, merged in every request.",
            description=DESCRIPTION.strip(),
            license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
            openapi_tags=[{"name": name, "description": text} for name, text in TAGS],
            generate_unique_id_function=_operation_id,
            docs_url=None,  # routes/docs.py has a viewer that loads nothing from elsewhere
            redoc_url=None,
            lifespan=lifespan,
            responses=refusals(500),
        )
        self._has_keys = has_keys
        self.described: list[tuple[str, str]] = []
        """Method and path of each route in the description."""
        self._document: dict[str, Any] | None = None

    def include(self, router: APIRouter, tag: str, responses: Responses) -> None:
        """Add the routes of `router`."""
        self.include_router(router, tags=[tag], responses=responses)
        routes = [route for route in router.routes if isinstance(route, APIRoute) and route.include_in_schema]
        self.described += [(method, route.path_format) for route in routes for method in sorted(route.methods or ())]

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        if self._document is None:
            self._document = _exact(super().openapi())
            _complete(self._document, self._has_keys)
        return self._document


def _operation_id(route: APIRoute) -> str:
    return route.name


def _exact(part: Any) -> Any:
    # FastAPI writes bounds as floats: 2**63 becomes 9.223372036854776e18, which is larger.
    if isinstance(part, dict):
        return {key: int(value) if key in BOUNDS and value == int(value) else _exact(value) for key, value in part.items()}
    return [_exact(item) for item in part] if isinstance(part, list) else part


def _complete(document: dict[str, Any], has_keys: bool) -> None:
    components = document["components"]
    _, events = models_json_schema([(event, "serialization") for event in EVENTS], ref_template="#/components/schemas/{model}")
    components["schemas"] |= events["$defs"]
    for unused in (FASTAPI_ERROR, "ValidationError"):
        components["schemas"].pop(unused, None)
    components["headers"] = {"X-Request-ID": REQUEST_ID}
    if has_keys:
        text = "A key that the operator made with `python -m server.keys`."
        components["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer", "description": text}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete_operation(operation, has_keys=has_keys, is_public=is_open(path))


def _complete_operation(operation: dict[str, Any], *, has_keys: bool, is_public: bool) -> None:
    # The first paragraph of a route's docstring is its summary. OpenAPI's summaries are plain text, unlike its descriptions.
    summary, _, rest = operation.pop("description", "").partition("\n\n")
    operation["summary"] = CODE.sub(r"“\1”", summary).rstrip(".")
    if rest:
        operation["description"] = rest
    responses = operation["responses"]
    if "422" in responses and FASTAPI_ERROR in str(responses["422"]):
        del responses["422"]
    if not has_keys:
        responses |= {str(status): refusal for status, refusal in refusals(421).items()}
    elif not is_public:
        operation["security"] = [{KEY: []}]
        responses |= {str(status): refusal for status, refusal in refusals(401, 403, 429).items()}
    operation["responses"] = dict(sorted(responses.items()))
    for status, response in responses.items():
        is_reply = status.startswith("2")
        # Only now, because FastAPI removes nulls from examples.
        for content in [*response.get("content", {}).values()][:1]:
            content.setdefault("example", REPLIES.get(operation["operationId"]) if is_reply else refusal_example(int(status)))
        response["headers"] = {"X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"}} | response.get("headers", {})
