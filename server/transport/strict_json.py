"""Strict JSON parser (RFC 8259), in a time that the length bounds. Knows nothing of the content."""

import json
import re
from collections import Counter
from itertools import accumulate
from typing import Any

MAX_CONTAINERS = 8192
"""Maximum number of lists and objects. Python takes far longer to build them than a client to send them."""
MAX_DEPTH = 128
MAX_MEMBERS = 2048
"""Maximum number of fields of one object: pydantic reports each unknown one."""
MAX_STRINGS = 32768
MAX_FRACTIONS = 16384
"""Maximum number of numbers with a point or an exponent, each of which costs a call."""
MAX_VALUES = 2**16
"""Maximum number of values in all lists and objects, or `max_list + MAX_OTHERS` if that is more."""
MAX_OTHERS = 16384
"""Values allowed besides those of lists of `max_list`."""
MAX_DIGITS = 400
"""Maximum number of digits of one number: parsing an integer takes time quadratic in its digits."""
SHORT = 4096
"""Bytes of a text that cannot exceed any limit but the depth."""
MAX_EXACT = 2**53
"""Above this, a float with a point is not meant to be an integer."""
NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
DIGITS_AS_ZEROS = bytes(ord("0") if ord("0") <= code <= ord("9") else ord(" ") for code in range(256))
MANY_DIGITS = b"0" * (MAX_DIGITS + 1)
STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
"""Change of the depth at a bracket."""
LONG_LIST = re.compile(rb'"(\w{1,64})"\s*+:\s*+(?:\[\s*+)+[-+0-9.eE,\s\]\[]{4096}+')
"""A field whose value is a long list of numbers, or of lists of numbers."""


class JsonError(ValueError):
    """A text is no JSON, or exceeds a limit. `field` names the field that holds too much, if it is known."""

    def __init__(self, message: str, field: str | None = None) -> None:
        self.field = field
        super().__init__(message)


def read_json(text: bytes, max_list: int = MAX_VALUES) -> Any:
    """Return the value in `text`, where `2.0` is the integer 2. Raises `JsonError`.

    `max_list` is the most values that one list of a sound text can hold. A text with more values than its lists may hold is
    refused before it is parsed. Takes at most about 10 ms for 1 MiB, in which no other thread runs.
    """
    _check_size(text, max_list)
    try:
        return json.loads(
            text.decode("utf-8-sig"), object_pairs_hook=_object, parse_float=_number, parse_constant=_reject_constant
        )
    except UnicodeDecodeError as error:
        raise JsonError(f"is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise JsonError(f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]} at character {error.pos}") from error


def _check_size(text: bytes, max_list: int) -> None:
    # Counts bytes: a list of half a million numbers takes 2 ms to refuse this way, and 30 ms to parse.
    if len(text) <= SHORT and text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    outside = _without_strings(text)
    _check_values(text, outside, max_list)
    _check_brackets(outside)
    _check_numbers(outside)


def _without_strings(text: bytes) -> bytes:
    # After the first fault of a text this may misread the rest, but the parser stops at the fault.
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    if text.count(b'"') > 2 * MAX_STRINGS:
        raise JsonError(f"has more than {MAX_STRINGS} strings")
    return b"".join(text.split(b'"')[::2])


def _check_values(text: bytes, outside: bytes, max_list: int) -> None:
    num_values = outside.count(b",") + 1
    most = min(max(MAX_VALUES, max_list + MAX_OTHERS), max_list * outside.count(b"[") + MAX_OTHERS)
    if num_values > most:
        field = LONG_LIST.search(text)
        raise JsonError(f"has {num_values} values, expected at most {most}", field[1].decode() if field else None)


def _check_brackets(outside: bytes) -> None:
    if outside.count(b"[") + outside.count(b"{") > MAX_CONTAINERS:
        raise JsonError(f"has more than {MAX_CONTAINERS} lists and objects")
    if max(accumulate(map(STEPS.__getitem__, outside.translate(None, NO_BRACKET))), default=0) > MAX_DEPTH:
        raise JsonError(f"has lists and objects nested more than {MAX_DEPTH} deep")


def _check_numbers(outside: bytes) -> None:
    # The e of `true` follows a u, that of `false` an s.
    num_exponents = outside.count(b"e") - outside.count(b"ue") - outside.count(b"se") + outside.count(b"E")
    if outside.count(b".") + num_exponents > MAX_FRACTIONS:
        raise JsonError(f"has more than {MAX_FRACTIONS} numbers with a point or an exponent")
    if MANY_DIGITS in outside.translate(DIGITS_AS_ZEROS):
        raise JsonError(f"has a number of more than {MAX_DIGITS} digits")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        # Parsers disagree on which of the two counts.
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise JsonError(f"has the field {twice[:64]!r} twice in one object")
    if len(members) > MAX_MEMBERS:
        raise JsonError(f"has an object of {len(members)} fields, expected at most {MAX_MEMBERS}")
    return members


def _reject_constant(name: str) -> Any:
    raise JsonError(f"is not JSON: {name} is no number of it")


def _number(digits: str) -> int | float:
    # JSON has one kind of number, and some clients write all numbers with a point.
    value = float(digits)
    return int(value) if abs(value) <= MAX_EXACT and value.is_integer() else value
