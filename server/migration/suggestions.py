"""Suggestions for unknown fields and routes. Only computed when a request is refused."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from inspect import isclass
from typing import Any, get_args

from pydantic import BaseModel

from lori.names import MISSPELT, near_names
from server.migration.requests import ABSENT_ROUTES, EXPLAINED, IN_BODY, RENAMED, ROUTES, VALUES, Hints

MAX_NAME = 64
"""Maximum number of characters of a field name that is looked up. A longer name is no typo."""
MAX_PATH = 200
"""Maximum number of characters of a path that are shown and looked up."""
MAX_INNER = 10
"""Maximum number of fields inside an unknown field for which suggestions are given."""
MAX_LISTED = 8
"""A body with at most this many fields has all of them listed."""
NAMED_ROUTE = re.compile(r"\b(GET|POST|PUT|DELETE) (/[^\s,;]*)")
SEPARATORS = re.compile(r"[\s-]+|(?<=[a-z])(?=[A-Z])")
"""Boundaries between the words of `max-tokens` and `maxTokens`."""
Place = str | int
Route = tuple[str, str]
"""A method and a path."""


def fields_at(body: Any, places: Sequence[Place]) -> frozenset[str]:
    """Return the names of the fields of an object at `places` in a body of the type `body`."""
    models = frozenset(_models(body))
    for place in places:
        # Places also hold branches of unions and indices of elements.
        if inner := [annotation for model in models for name, annotation in _fields(model).items() if name == place]:
            models = frozenset(model for annotation in inner for model in _models(annotation))
    return frozenset(name for model in models for name in _fields(model))


@cache
def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def unknown_field(name: str, fields: frozenset[str], value: object = None) -> str:
    """Return the fault of an unknown field `name` where `fields` are allowed, with a suggestion.

    If `value` is an object whose fields belong beside the prompt, the suggestions for these follow, for `MAX_INNER` of them.
    """
    hint = _field_hint(name, fields)
    if hint == IN_BODY and isinstance(value, dict):
        unknown = [key for key in value if key not in fields and len(key) <= MAX_NAME]
        more = [f"and {len(unknown) - MAX_INNER} more"] if len(unknown) > MAX_INNER else []
        hint = "; ".join([hint, *(f"{key!r}: {_field_hint(key, fields)}" for key in unknown[:MAX_INNER]), *more])
    return f"unknown field{_separated(hint)}"


def _field_hint(name: str, fields: frozenset[str]) -> str:
    if not fields or len(name) > MAX_NAME:
        return ""
    if name in fields:
        return "it does not go with this 'type'"
    if ours := next((field for field in RENAMED.get(name, ()) if field in fields), None):
        return f"use {ours!r}"
    if hint := _first(EXPLAINED.get(name, ()), fields):
        return hint
    written = SEPARATORS.sub("_", name).lower()
    if near := [written] if written in fields else near_names(written, sorted(fields), MISSPELT):
        return f"did you mean {near[0]!r}?"
    return f"expected {', '.join(sorted(fields))}" if len(fields) <= MAX_LISTED else "/docs lists those that there are"


def value_hint(field: str, value: object, body: Any) -> str:
    """Return a suggestion for the value of `field` in a body of the type `body`, after a colon. Often empty."""
    hints = VALUES.get((field, type(value)))
    return _separated(_first(hints, fields_at(body, ()))) if hints else ""


def _first(hints: Hints, fields: frozenset[str]) -> str:
    return next((text for field, text in hints if not field or field in fields), "")


def _separated(hint: str) -> str:
    return f": {hint}" if hint else ""


def unknown_route(method: str, path: str, routes: Sequence[Route]) -> str:
    """Return the fault of an unknown `path`, with the route of `routes` that may be meant."""
    shown = path if len(path) <= MAX_PATH else f"{path[: MAX_PATH - 1]}…"
    return f"there is no route {method} {shown}: {_route_hint(method, path[:MAX_PATH].lower().rstrip('/'), routes)}"


def _route_hint(method: str, path: str, routes: Sequence[Route]) -> str:
    if absent := ABSENT_ROUTES.get(path):
        return absent
    if hint := ROUTES.get(path):
        return f"did you mean {hint}?"
    paths = sorted({route_path for _, route_path in routes}, key=len, reverse=True)
    # A base URL with one part too many, or too few.
    near = [route_path for route_path in paths if path.endswith(route_path) or route_path.endswith(path or "/")][:1]
    near = near or near_names(path, paths, MISSPELT)[:1]
    if not near:
        return "/docs lists those that there are"
    methods = [route_method for route_method, route_path in routes if route_path == near[0]]
    return f"did you mean {method if method in methods else methods[0]} {near[0]}?"


def routes_in(text: str) -> list[Route]:
    """Return the routes that a hint names."""
    return [(match[1], match[2]) for match in NAMED_ROUTE.finditer(text)]
