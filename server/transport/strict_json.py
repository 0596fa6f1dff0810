"""Reads JSON as RFC 8259 has it, in a time that its length bounds. Knows nothing of what is in it."""

import json
import re
from collections import Counter
from typing import Any

MAX_CONTAINERS = 16384
"""Python takes far longer to build lists and objects than a client to send them."""
MAX_DEPTH = 128
MAX_MEMBERS = 2048
"""Of one object: each that is unknown is a fault of its own."""
MAX_EXACT = 2**53
"""Beyond it a float with a point is no integer that was meant."""
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))


class JsonError(ValueError):
    """A text is no JSON, or more of it than anybody means."""


def read_json(text: bytes) -> Any:
    """Returns the value in `text`, where `2.0` is the integer 2. Raises `JsonError`."""
    _check_shape(text)
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object, parse_float=_number)
    except UnicodeDecodeError as error:
        raise JsonError(f"is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise JsonError(f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]} at character {error.pos}") from error
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError("is not JSON that can be read: it has a number of thousands of digits") from error


def _check_shape(text: bytes) -> None:
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    brackets = STRING.sub(b"", text).translate(None, NO_BRACKET)
    if brackets.count(b"[") + brackets.count(b"{") > MAX_CONTAINERS:
        raise JsonError(f"has more than {MAX_CONTAINERS} lists and objects")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise JsonError(f"has lists and objects nested more than {MAX_DEPTH} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_MEMBERS:
        raise JsonError(f"has an object of {len(pairs)} fields, expected at most {MAX_MEMBERS}")
    found = dict(pairs)
    if len(found) < len(pairs):
        # Readers do not agree on which of the two is meant.
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise JsonError(f"has the field {twice[:64]!r} twice in one object")
    return found


def _number(digits: str) -> int | float:
    # JSON has one kind of number, and some clients write all of them with a point.
    value = float(digits)
    return int(value) if abs(value) <= MAX_EXACT and value.is_integer() else value
