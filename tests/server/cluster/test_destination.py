"""What an ingress reads of a request."""

import json

import pytest

from server.cluster.affinity import ANY, key_of
from server.cluster.destination import is_for_all, key_in
from server.schemas.fields import MAX_ADAPTERS

BASE = "SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"prompt": "a"}, ANY),
        ({"adapter": "math"}, "math"),
        ({"adapter": "math@0123"}, "math"),
        ({"adapter": ["safety", "math"], "weights": [1, 2]}, "math+safety"),
        ({"adapter": [{"name": "safety", "weight": 1}, "math"]}, "math+safety"),
        ({"model": "math:1+safety:0.5"}, "math+safety"),
        ({"model": BASE}, ANY),
        ({"model": BASE, "adapters": ["intent"]}, "intent"),
        ({"model": "org/Some-Model"}, ANY),
        ({"adapter": "\ud800"}, ANY),  # half a character, which nothing can be encoded with: its request was never sent on
        ({"adapter": ["math", "a" * 100_000, "a\nb"]}, "math"),
        ({"adapter": 7, "adapters": None, "model": ["x"]}, ANY),
        ([1, 2], ANY),
    ],
)
def test_the_key_is_of_the_adapters_that_are_named(body: object, key: str) -> None:
    assert key_in(json.dumps(body).encode(), BASE) == key


@pytest.mark.parametrize("num_named", [MAX_ADAPTERS, MAX_ADAPTERS + 1])
@pytest.mark.parametrize("form", ["model", "adapter", "adapters"])
def test_what_names_more_than_a_replica_takes_is_not_read(form: str, num_named: int) -> None:
    """A mebibyte of `a+a+a+…` held up every other request for a sixth of a second."""
    names = [f"a{number}" for number in range(num_named)]
    body = {form: "+".join(names) if form == "model" else names}
    assert key_in(json.dumps(body).encode(), BASE) == (key_of(names) if num_named == MAX_ADAPTERS else ANY)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_names_none(body: bytes) -> None:
    assert key_in(body, BASE) == ANY


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/adapters", True),
        ("DELETE", "/adapters/math", True),
        ("PUT", "/adapters/math/alias", True),
        ("POST", "/adapters/math/load", True),
        ("POST", "/v1/load_lora_adapter", True),
        ("GET", "/metrics", True),
        ("GET", "/adapters", True),
        ("GET", "/adapters/math@0123", True),
        ("GET", "/adapters/compare", False),
        ("GET", "/adapters/math/alias", False),
        ("GET", "/v1/models", False),
        ("POST", "/generate", False),
        ("POST", "/v1/chat/completions", False),
    ],
)
def test_what_changes_adapters_or_shows_them_is_for_all(method: str, path: str, expected: bool) -> None:
    assert is_for_all(method, path) is expected
