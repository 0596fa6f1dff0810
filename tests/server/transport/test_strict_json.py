"""Strict JSON: RFC 8259 only, without ambiguity, and within limits on the time that parsing takes."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.transport.strict_json import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_FRACTIONS,
    MAX_MEMBERS,
    MAX_OTHERS,
    MAX_STRINGS,
    MAX_VALUES,
    JsonError,
    read_json,
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)


@pytest.mark.slow
@given(VALUES)
def test_written_json_is_read_back(value: Any) -> None:
    assert read_json(json.dumps(value).encode()) == value
    text = json.dumps(value, ensure_ascii=False)
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert read_json(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2.0", 2),
        ("-3e2", -300),
        ("9007199254740992.0", 2**53),
        ("2.5", 2.5),
        ("1e300", 1e300),
        ("-0.0", 0),
        ("1e999", float("inf")),
    ],
)
def test_a_whole_number_is_an_integer_however_it_is_written(text: str, value: float) -> None:
    number = read_json(text.encode())
    assert (type(number), number) == (type(value), value)


def test_a_byte_order_mark_is_accepted() -> None:
    assert read_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON: expecting value at character 0"),
        (b'{"a": 1,}', "is not JSON"),
        (b'{"a": 1} {}', "is not JSON: extra data at character 9"),
        (b'{"a": NaN}', "is not JSON: NaN is no number of it"),
        (b"[Infinity]", "is not JSON: Infinity is no number of it"),
        (b"-Infinity", "is not JSON: -Infinity is no number of it"),
        (b"{'a': 1}", "is not JSON"),
        (b'"\x00"', "is not JSON: invalid control character"),
        (b'{"a": "\xff"}', "is not UTF-8: invalid start byte at byte 7"),
        (b'"\xed\xa0\x80"', "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        ('{"a": 1}'.encode("utf-32-le"), "is not JSON"),
        (b'{"a": 1, "b": 2, "a": 1}', "has the field 'a' twice"),
        (b'[{"x": {"\\u0061": 1, "a": 2}}]', "has the field 'a' twice"),
        (b"1" * 5000, "has a number of more than 400 digits"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested more than"),
        (b"[" * 1_000_000, "lists and objects"),
        (b'{"a":' * 8_000, "nested more than"),
        (b"[" + b"[]," * MAX_CONTAINERS + b"1]", "has more than 8192 lists and objects"),
        (b"[" + b'"",' * MAX_STRINGS + b'""]', "has more than 32768 strings"),
        (b'["' + b'"' * 2 * MAX_STRINGS + b'"]', "has more than 32768 strings"),
        (b"[" + b"1.5," * MAX_FRACTIONS + b"2E1]", "has more than 16384 numbers with a point or an exponent"),
        (b"[" + b"1e9," * MAX_FRACTIONS + b"0.1]", "has more than 16384 numbers with a point or an exponent"),
        (b"[" + b"1" * (MAX_DIGITS + 1) + b"," + b" " * 4096 + b"1]", "has a number of more than 400 digits"),
        (json.dumps({str(i): i for i in range(MAX_MEMBERS + 1)}).encode(), "has an object of 2049 fields, expected at most 2048"),
    ],
)
def test_invalid_or_ambiguous_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(JsonError) as caught:
        read_json(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_documents_at_the_limits_are_read() -> None:
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert json.dumps(read_json(deep)).encode() == deep
    assert len(read_json(b"[" + b"[]," * (MAX_CONTAINERS - 2) + b"[]]")) == MAX_CONTAINERS - 1
    assert len(read_json(json.dumps({str(i): i for i in range(MAX_MEMBERS)}).encode())) == MAX_MEMBERS
    assert len(read_json(b"[" + b'"\\\\","\\"",' * (MAX_STRINGS // 2 - 1) + b'"","["]')) == MAX_STRINGS
    assert sum(read_json(b"[" + b"true,false,1e0," * MAX_FRACTIONS + b"null]")[:-1]) == 2 * MAX_FRACTIONS
    assert read_json(b" " * 4096 + b"9" * MAX_DIGITS) == 10**MAX_DIGITS - 1


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (b'{"x": [1], "prompt": [%s]}', "prompt"),
        (b'{"x": "prompt", "tokens" : [ [%s] ]}', "tokens"),
        (b'[{"y": "[1, 2, 3]", "z":[%s, 2, "x"]}]', "z"),
        (b'["prompt", %s]', None),
    ],
)
def test_more_values_than_lists_can_hold_are_refused_before_they_are_parsed(text: bytes, field: str | None) -> None:
    """Regression: 1 MiB of `[1,1,…]` blocked the interpreter for 75 ms."""
    numbers = b"1, " * (MAX_OTHERS + 600) + b"no JSON"
    with pytest.raises(JsonError) as caught:
        read_json(text % numbers, max_list=100)
    assert caught.value.field == field
    assert re.fullmatch(r"has 1[67]\d{3} values, expected at most 16[4-7]\d\d", str(caught.value))
    with pytest.raises(JsonError, match="is not JSON"):
        read_json(text % numbers, max_list=17_000)


def test_lists_are_bounded_each_and_in_sum() -> None:
    full = b"[" + b"1," * 999 + b"1]"
    many = b"[" + full + (b"," + full) * (MAX_VALUES // 1000 - 1) + b"]"
    assert len(read_json(many, max_list=1000)) == MAX_VALUES // 1000
    with pytest.raises(JsonError, match=f"expected at most {MAX_VALUES}"):
        read_json(many[:-1] + b"," + full + b"]", max_list=1000)
    longest = b"[" + b"1," * (MAX_VALUES + MAX_OTHERS - 1) + b"1]"
    assert len(read_json(longest, max_list=MAX_VALUES)) == MAX_VALUES + MAX_OTHERS


def test_commas_inside_a_text_are_text() -> None:
    text = json.dumps({"a": ', \\ " ,' * 100_000, "b": '\\",'})
    assert read_json(text.encode(), max_list=1) == json.loads(text)


@pytest.mark.parametrize("inside", ["[" * 50_000, '\\"[' * 20_000, "\\\\", '{\\n"'.replace('"', "") * 30_000])
def test_brackets_inside_a_text_are_text(inside: str) -> None:
    text = f'{{"a": "{inside}", "b": [{"[]," * 200} "{inside}"]}}'
    assert read_json(text.encode()) == json.loads(text)
