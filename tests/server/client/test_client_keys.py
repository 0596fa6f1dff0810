"""Both clients with a server that needs keys and limits its tenants."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from server.client import ForbiddenError, RateLimitError, UnauthenticatedError
from tests.server.both_clients import KINDS, Connect, connecting
from tests.server.keyed import ACME, MONITOR, make_service, served, write_keys


@pytest.fixture
def url(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Iterator[str]:
    """Yield the address of a server with keys."""
    with served(make_service(tokenizer, write_keys(tmp_path, "requests_per_minute = 1"))) as http:
        yield str(http.base_url)


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest, url: str) -> Iterator[Connect]:
    """Yield a function that makes clients. They are closed before the server ends, which would wait for them."""
    assert url
    with connecting(request.param) as connect:
        yield connect


def test_a_key_is_needed_and_its_limit_is_reported(url: str, connect: Connect) -> None:
    for key in (None, "lori_wrong-key"):
        with pytest.raises(UnauthenticatedError):
            connect(url, api_key=key).generate(prompt="x")
        assert connect(url, api_key=key).health().status == "ok"
    with pytest.raises(ForbiddenError, match="monitor"):
        connect(url, api_key=MONITOR).generate(prompt="x")
    client = connect(url, api_key=ACME, longest_wait_s=0)
    assert client.generate(prompt="x").text == "xxx"
    with pytest.raises(RateLimitError) as caught:
        client.generate(prompt="x")
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 60
