"""The id of an HTTP request: the client's own if it is valid, else a new one."""

import re
import secrets
from collections.abc import Iterable

HEADER = b"x-request-id"
SOUND = re.compile(rb"[A-Za-z0-9._~:/+=@-]{1,128}")
"""Ids that are safe in a log, a header and a command line."""


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id of a request with these headers."""
    for name, value in headers:
        if name == HEADER and SOUND.fullmatch(value):
            return value.decode()
    return f"req-{secrets.token_hex(12)}"
