"""Request targets in absolute form, `GET http://name/path HTTP/1.1`: uvicorn reads their path alone."""

import re

AUTHORITY = re.compile(rb"[a-z][a-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#]*)", re.IGNORECASE)
Headers = list[tuple[bytes, bytes]]


def take_authority(target: bytes, headers: Headers) -> None:
    """Put the host that an absolute target names in the place of the Host header, which counts for nothing beside it.

    RFC 9112, section 3.2.2. Other targets change nothing.
    """
    if named := AUTHORITY.match(target):
        headers[:] = [(name, value) for name, value in headers if name != b"host"]
        headers.append((b"host", named[1]))
