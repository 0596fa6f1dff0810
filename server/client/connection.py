"""Connection options of both clients."""

from typing import TypedDict

import httpx

from lori.loopback import direct_mounts

URL = "http://localhost:8000"
TIMEOUT_S = 600.0
CONNECT_S = 10.0
NUM_RETRIES = 2
LONGEST_WAIT_S = 60.0
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=4.0)
"""Limits of the connection pool. Servers and gateways close connections that were idle for a while, at least 5 s; a request on
such a connection would get no answer."""


class Options(TypedDict):
    """The arguments of an httpx client."""

    base_url: str
    headers: dict[str, str]
    timeout: httpx.Timeout
    limits: httpx.Limits
    mounts: dict[str, None]


def options(url: str, api_key: str | None, timeout_s: float | None) -> Options:
    """Return the options to reach `url` with a key. `timeout_s` is how long the server may be silent."""
    return Options(
        base_url=url,
        headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(timeout_s, connect=CONNECT_S if timeout_s is None else min(CONNECT_S, timeout_s)),
        limits=LIMITS,
        mounts=direct_mounts(url),
    )
