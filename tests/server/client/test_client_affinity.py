"""The header by which gateways know which adapters a request names."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from server.client import ConnectionFailedError
from server.client.fields import GenerateFields
from tests.server.both_clients import KINDS, Connect, connecting
from tests.server.scripted import scripted

HEADER = re.compile(rb"\r\nX-Session-ID: ([^\r]*)\r\n")


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    with connecting(request.param) as connect:
        yield connect


def sent(connect: Connect, fields: GenerateFields, **options: Any) -> list[bytes]:
    """Return the header's values, if sent, in the request for a whole answer and in that for a stream."""
    with scripted(b"", b"") as server:
        client = connect(server.url, num_retries=0, **options)
        with pytest.raises(ConnectionFailedError):
            client.generate(**fields)
        with pytest.raises(ConnectionFailedError):
            [*client.stream(**fields)]
    return [value for request in server.requests for value in HEADER.findall(request)]


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        (GenerateFields(prompt="x", adapter="math@0123"), b"math"),
        (GenerateFields(prompt="x", adapter=["safety", "math"], weights=[1, 2]), b"math+safety"),
        (GenerateFields(prompt="x", adapter=({"name": "safety", "weight": 1}, {"name": "math", "weight": 1})), b"math+safety"),
    ],
)
def test_the_header_names_the_adapters_of_a_request(connect: Connect, fields: GenerateFields, value: bytes) -> None:
    assert sent(connect, fields, affinity_header="X-Session-ID") == [value, value]


def test_a_request_without_adapters_has_no_header(connect: Connect) -> None:
    assert sent(connect, GenerateFields(prompt="x"), affinity_header="X-Session-ID") == []
    assert sent(connect, GenerateFields(prompt="x", adapter=[]), affinity_header="X-Session-ID") == []
    # No adapter can have this name.
    assert sent(connect, GenerateFields(prompt="x", adapter="m\u00e4th\r\nx: y"), affinity_header="X-Session-ID") == []


def test_no_header_is_sent_by_default(connect: Connect) -> None:
    assert sent(connect, GenerateFields(prompt="x", adapter="math")) == []
