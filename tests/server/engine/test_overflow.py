"""Numbers too large or too small for their type, in every field of every route: refused by name, or harmless."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.live import Live

HUGE = ("1e400", "-1e400", "1e39", "-1e39", "1" + "0" * 30, "-1" + "0" * 30, "1" + "0" * 399, str(2**64))
TINY = ("5e-324", "1e-45", "1e-400", "-1e-400")
PROMPTS: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "x", "max_tokens": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
}
FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "n", "timeout_s", "priority",
)  # fmt: skip
OWN = {
    "/generate": ("logprobs", "prompt"),
    "/v1/completions": ("logprobs", "best_of", "prompt"),
    "/v1/chat/completions": ("top_logprobs", "max_completion_tokens"),
}


def bodies(path: str, number: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each field, and a body with `number` in that field."""
    for field in (*FIELDS, *OWN[path]):
        rest = json.dumps({key: value for key, value in PROMPTS[path].items() if key != field})
        yield field, f'{rest[:-1]}{"" if rest == "{}" else ", "}"{field}": {number}}}'
    adapters = "adapter" if path == "/generate" else "adapters"
    merged = f'"{adapters}": ["math", "safety"], "merge": "dare_ties"'
    for field, text in (
        ("logit_bias", f'"logit_bias": {{"5": {number}}}'),
        ("logit_bias", f'"logit_bias": {{"{number}": 1}}'),
        ("weights", f'"{adapters}": "math", "weights": [{number}]'),
        (adapters, f'"{adapters}": [{{"name": "math", "weight": {number}}}]'),
        ("density", f'{merged}, "density": {number}'),
        ("merge_seed", f'{merged}, "merge_seed": {number}'),
        ("grammar", f'"grammar": {{"type": "json_schema", "schema": {{"type": "string", "maxLength": {number}}}}}'),
    ):
        yield field, f"{json.dumps(PROMPTS[path])[:-1]}, {text}}}"
    if path != "/v1/chat/completions":
        yield "prompt", f'{{"prompt": [{number}], "max_tokens": 1}}'
    if path != "/generate":
        yield "model", f'{json.dumps(PROMPTS[path])[:-1]}, "model": "math:{number}+safety:1"}}'


@pytest.mark.parametrize("path", PROMPTS)
def test_a_number_that_overflows_is_refused_with_the_name_of_its_field(live: Live, path: str) -> None:
    for number in HUGE:
        for field, body in bodies(path, number):
            reply = live.client.post(path, content=body.encode(), headers={"Content-Type": "application/json"})
            assert 400 <= reply.status_code < 500, (body, reply.text)
            error = reply.json()["error"]
            assert field in (error["param"] or "") or field in error["message"], (body, error)
            assert len(reply.content) < 2000


@pytest.mark.parametrize("path", PROMPTS)
def test_a_number_that_rounds_to_zero_is_answered_or_refused(live: Live, path: str) -> None:
    for number in TINY:
        for field, body in bodies(path, number):
            reply = live.client.post(path, content=body.encode(), headers={"Content-Type": "application/json"})
            allowed = (200, 400, 404, 504) if field == "timeout_s" else (200, 400, 404)
            assert reply.status_code in allowed, (body, reply.text)


@pytest.mark.parametrize("number", [*HUGE, *TINY])
def test_huge_and_tiny_numbers_do_not_break_other_routes(live: Live, number: str) -> None:
    headers = {"Content-Type": "application/json"}
    reply = live.client.post("/detokenize", content=f'{{"tokens": [{number}]}}', headers=headers)
    assert reply.status_code == (200 if "e-400" in number else 400)
    for query in (f"/adapters?limit={number}", f"/adapters/compare?names={number}"):
        assert live.client.get(query).status_code in (200, 400, 404)


@pytest.mark.parametrize("field", ["grammar", "response_format"])
def test_a_wrong_value_is_not_quoted_whole(live: Live, field: str) -> None:
    path = "/generate" if field == "grammar" else "/v1/completions"
    reply = live.client.post(path, json={"prompt": "x", field: {"type": "z" * 10_000}})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field
    assert len(reply.content) < 600
