"""The API's description: complete, true to its own schemas, and shown without external files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from fastapi.routing import APIRoute
from transformers import PreTrainedTokenizerFast

from server import routes
from server.access.gate import is_open
from server.app import create_app
from server.description.responses import REFUSALS
from server.errors import TABLE
from server.routes.json_route import JsonRoute
from tests.server.keyed import make_service, write_keys
from tests.server.live import Live

Document = dict[str, Any]
EXAMPLES = ("/generate", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
"""Routes whose examples every caller may send."""


@pytest.fixture(scope="module")
def document(tokenizer: PreTrainedTokenizerFast) -> Document:
    """Return the description of a server without keys."""
    return create_app(make_service(tokenizer)).openapi()


def operations(document: Document) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the method and path of each operation, and the operation."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def check(document: Document, schema: dict[str, Any], value: object) -> None:
    """Raise if `value` does not match `schema`."""
    jsonschema_rs.validator_for({**schema, "components": document["components"]}).validate(value)


def references(part: object) -> Iterator[str]:
    """Yield the references to other parts of the document."""
    if isinstance(part, dict):
        yield from (value for key, value in part.items() if key == "$ref")
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from references(inner)


def test_every_route_is_described(document: Document) -> None:
    known = {tag["name"] for tag in document["tags"]}
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    for name, operation in operations(document):
        assert 10 < len(operation["summary"]) < 200, name
        assert set(operation["tags"]) <= known, name
        assert len(operation["tags"]) == 1, name
        for status, response in operation["responses"].items():
            assert response["description"], (name, status)
            assert response["headers"]["X-Request-ID"], (name, status)


def test_every_reference_resolves(document: Document) -> None:
    for reference in references(document):
        part = document
        for key in reference.removeprefix("#/").split("/"):
            part = part[key]


@pytest.mark.slow
def test_every_reply_has_an_example_that_fits_its_schema(document: Document) -> None:
    for name, operation in operations(document):
        for status, response in operation["responses"].items():
            content = response["content"]
            kind = next(iter(content))
            assert "example" in content[kind], (name, status)
            check(document, content[kind]["schema"], content[kind]["example"])
            if not status.startswith("2"):
                assert content[kind]["example"]["error"]["code"] == int(status)


def test_every_body_has_examples_that_fit_its_schema(document: Document) -> None:
    for name, operation in operations(document):
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            if kind != "application/json":
                continue
            schema = content["schema"]
            named = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
            assert named["examples"], name
            for example in named["examples"]:
                check(document, schema, example)


def test_bounds_are_exact(document: Document) -> None:
    seed = document["components"]["schemas"]["GenerateBody"]["properties"]["seed"]["anyOf"][0]
    assert (repr(seed["minimum"]), repr(seed["exclusiveMaximum"])) == ("0", "9223372036854775808")


def test_an_invalid_body_is_described_as_400_in_our_own_shape(document: Document) -> None:
    for name, operation in operations(document):
        assert "ValidationError" not in str(operation), name
        if "requestBody" in operation:
            assert {"400", "413"} <= operation["responses"].keys(), name
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_every_status_of_the_error_table_is_described(document: Document) -> None:
    named = {int(status) for _, operation in operations(document) for status in operation["responses"]}
    statuses = {status for status, _ in TABLE.values()}
    assert statuses <= REFUSALS.keys()
    assert statuses <= named


def test_every_429_is_described_with_retry_after(document: Document) -> None:
    refusals = [operation["responses"]["429"] for _, operation in operations(document) if "429" in operation["responses"]]
    assert refusals
    assert all("Retry-After" in response["headers"] for response in refusals)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_streams_are_described_event_by_event(document: Document, path: str) -> None:
    stream = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    events = stream["itemSchema"]["oneOf"]
    data = {event["properties"]["data"].get("contentSchema", {}).get("$ref", "").rpartition("/")[2] for event in events}
    if path == "/generate":
        assert [event["properties"]["event"]["const"] for event in events] == ["token", "done", "error"]
        assert data == {"TokenData", "DoneData", "ErrorReply"}
    else:
        assert events[-1]["properties"]["data"] == {"const": "[DONE]"}
        assert "ErrorReply" in data


def test_operations_that_need_a_key_say_so(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    document = create_app(make_service(tokenizer, write_keys(tmp_path))).openapi()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert is_open(path) == ("security" not in operation), path
            assert is_open(path) or {"401", "403", "429"} <= operation["responses"].keys(), path
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_without_keys_the_description_does_not_mention_them(document: Document) -> None:
    assert "securitySchemes" not in document["components"]
    assert not any("401" in operation["responses"] for _, operation in operations(document))


def test_every_body_is_read_as_strict_json() -> None:
    modules = [module for module in vars(routes).values() if hasattr(module, "router")]
    routers = [router for module in modules for router in (module.router, getattr(module, "admin", None)) if router]
    with_body = [route for router in routers for route in router.routes if isinstance(route, APIRoute) and route.body_field]
    assert len(with_body) >= 8
    for route in with_body:
        assert isinstance(route, JsonRoute), route.path


def test_an_undescribed_method_is_405_with_the_described_ones(live: Live) -> None:
    for path, methods in live.client.get("/openapi.json").json()["paths"].items():
        reply = live.client.options(re.sub(r"{\w+}", "math", path))
        assert reply.status_code == 405, path
        assert {method.upper() for method in methods} <= set(reply.headers["allow"].split(", ")), path


@pytest.mark.parametrize("path", EXAMPLES)
def test_the_examples_of_bodies_are_answered(live: Live, path: str) -> None:
    document = live.client.get("/openapi.json").json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for body in document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["examples"]:
        reply = live.client.post(path, json=body)
        assert reply.status_code == 200, (body, reply.text)
        content = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
        check(document, content["schema"], reply.json())


def test_a_summary_is_plain_text(live: Live) -> None:
    document = live.client.get("/openapi.json").json()
    summaries = {
        operation["operationId"]: operation["summary"] for path in document["paths"].values() for operation in path.values()
    }
    assert [summary for summary in summaries.values() if re.search(r"[`*\[]", summary)] == []
    assert summaries["completions"].endswith("“model” names the adapters")
    assert "`" in document["info"]["description"]


def test_the_viewer_loads_nothing_external(live: Live) -> None:
    page = live.client.get("/docs").text
    assert not re.search(r"(https?:)?//[\w.]", page)
    assets = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len([asset for asset in assets if asset.startswith("static/docs/")]) == 2
    for asset in assets:
        if not asset.startswith("data:"):
            assert live.client.get(f"/{asset}").status_code == 200, asset
