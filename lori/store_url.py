"""Where a store is: a folder's path, or an address of fsspec's. That can hold a secret: nothing prints one as it is."""

import re

URL = re.compile(r"[a-z0-9][a-z0-9+.-]*(::|://)", re.IGNORECASE)
USER_INFO = re.compile(r"(?<=://)([^/:[\s]+:(?!\d*(/|\s|$))\S*@|[^/\s]*@)")
"""Before the last @ of the host or, where no port follows a colon, before the last @ of all: a secret may have slashes."""
QUERY = re.compile(r"\?\S*")


def is_url(place: str) -> bool:
    """Says whether `place` is an address, such as s3://bucket/adapters, and no path of this machine."""
    return bool(URL.match(place))


def redacted(text: str) -> str:
    """Returns `text` without what stands before the host and after the question mark of the addresses in it."""
    return QUERY.sub("?…", USER_INFO.sub("…@", text)) if "://" in text else text
