"""The fields of a request that an ingress reads."""

import json
import tracemalloc

import pytest

from lori.merge_options import MAX_ADAPTERS, MAX_WEIGHT
from server.affinity import ANY, key_of
from server.cluster.destination import MAX_NAMING_BYTES, affinity_key, is_for_all_replicas, num_prompts, read_fields
from server.schemas.completions import MAX_PROMPTS

BASE = "SmolLM2-135M-Instruct"
MEBIBYTE = 1 << 20


def key_of_body(body: bytes) -> str:
    return affinity_key(read_fields(body), BASE)


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
        ({"adapter": "\ud800"}, ANY),  # a lone surrogate, which cannot be encoded: its request was never sent on
        ({"adapter": ["math", "a" * 10_000, "a\nb"]}, "math"),
        ({"adapter": ["math", "a" * MAX_NAMING_BYTES]}, ANY),
        ({"prompt": [1] * 300_000, "adapter": "math", "n": None}, "math"),
        ({"adapter": 7, "adapters": None, "model": ["x"]}, ANY),
        ([1, 2], ANY),
    ],
)
def test_the_affinity_key_has_the_named_adapters(body: object, key: str) -> None:
    assert key_of_body(json.dumps(body).encode()) == key


@pytest.mark.parametrize("num_named", [MAX_ADAPTERS, MAX_ADAPTERS + 1])
@pytest.mark.parametrize("form", ["model", "adapter", "adapters"])
def test_more_names_than_a_replica_accepts_are_not_read(form: str, num_named: int) -> None:
    """Regression: a mebibyte of `a+a+a+…` held up every other request for a sixth of a second."""
    names = [f"a{number}" for number in range(num_named)]
    body = {form: "+".join(names) if form == "model" else names}
    assert key_of_body(json.dumps(body).encode()) == (key_of(names) if num_named == MAX_ADAPTERS else ANY)


def test_the_longest_names_that_a_replica_accepts_are_read() -> None:
    names = [f"{number:02}" + "a" * 62 for number in range(MAX_ADAPTERS)]
    named = [{"name": f"{name}@{'f' * 12}", "weight": -MAX_WEIGHT + 0.1234567890123456} for name in names]
    assert key_of_body(json.dumps({"adapter": named}, indent=8).encode()) == key_of(names)


def test_fields_are_read_as_a_replica_reads_them() -> None:
    assert key_of_body(b'\xef\xbb\xbf{"prompt": "x", "adapter": "math"}') == "math"
    assert key_of_body(b'{"\\u0061dapter": "m\\u0061th"}') == "math"
    assert key_of_body(b'{"x": {"adapter": "intent"}, "y": ["adapter", "intent"], "adapter": "math", "model": null}') == "math"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"adapter": "math", "x": ' + b"[" * 100_000,
        b'{"adapter": "math", "x": ' + b'{"x": ' * 100_000,
        b'{"adapter": "math"} x',
        b'{"adapter": "math", "model": "\xff"}',
        b'{"adapter": "math", "model": "\\ud800"}',
        b'{"adapter": "math", "model": 1e999}',
        b'{"adapter": "math", "x": NaN}',
    ],
)
def test_a_body_that_is_no_json_names_no_adapter(body: bytes) -> None:
    assert key_of_body(body) == ANY


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        ("a", 1),
        (["a"], 1),
        (["a", 'b\\"],[', "c"], 3),
        ([1, 2, 3], 1),
        ([[1, 2], [3]], 2),
        ([[]], 1),
        ([], 1),
        (None, 1),
        ({"a": ["b", "c"]}, 1),
        (["a"] * MAX_PROMPTS, MAX_PROMPTS),
        (["a"] * (MAX_PROMPTS + 1), 1),
        (["a"] * 200_000, 1),
    ],
)
def test_the_prompts_of_a_batch_are_counted(prompt: object, number: int) -> None:
    for indent in (None, 2):
        assert num_prompts(read_fields(json.dumps({"prompt": prompt}, indent=indent).encode())) == number
    assert num_prompts(read_fields(b"{}")) == num_prompts(read_fields(b'{"prompt": ["a", "b"]')) == 1


def peak_bytes(body: bytes) -> int:
    """Return the peak bytes that Python allocates to read a body."""
    read_fields(b'{"prompt": ["a"]}')
    tracemalloc.start()
    try:
        fields = read_fields(body)
        affinity_key(fields, BASE)
        num_prompts(fields)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "unit", [b"1,", b"[],", b"{},", b'"",', b'"a",', b"[[[[[[[[[[1]]]]]]]]]],", b'{"a":1},', b'"\\n",', b"1.5e3,"]
)
@pytest.mark.parametrize("field", [b"prompt", b"adapter", b"model", b"x"])
def test_no_values_are_built_from_a_long_body(field: bytes, unit: bytes) -> None:
    """Regression: a mebibyte of lists held up every other request for a fifth of a second while its values were built."""
    content = b'{"%s":[%s1],"adapters":"math"}' % (field, unit * (MEBIBYTE // len(unit)))
    assert key_of_body(content) == "math"
    assert peak_bytes(content) < 64 * 1024


@pytest.mark.parametrize("member", [b'"prompt":["a","b"]', b'"adapter":["a"]', b'"x":1', b'"model":"a"'])
def test_no_values_are_built_from_a_repeated_field(member: bytes) -> None:
    content = b"{" + (member + b",") * (MEBIBYTE // len(member)) + b'"adapters":"math"}'
    assert "math" in key_of_body(content)
    assert peak_bytes(content) < 64 * 1024


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/adapters", True),
        ("DELETE", "/adapters/math", True),
        ("PUT", "/adapters/math/alias", True),
        ("POST", "/adapters/math/load", True),
        ("PUT", "/merges/both", True),
        ("DELETE", "/merges/both", True),
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
def test_requests_that_change_or_show_adapters_are_for_all_replicas(method: str, path: str, expected: bool) -> None:
    assert is_for_all_replicas(method, path) is expected
