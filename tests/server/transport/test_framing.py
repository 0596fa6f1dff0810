"""The framing of requests, over a socket: each is answered once, or refused and its connection closed."""

import socket
from contextlib import closing
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.server.fake_service import served
from tests.server.framing import BODY, CASES, WAYS, Case, ask, check, chunked, head, parsed, sized
from tests.server.keyed import ACME, write_keys
from tests.server.live import LIMIT_S, Live
from tests.server.rig import FakeEngine
from tests.server.transport.test_slow_clients import heard_to_the_end


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_request_is_answered_once_or_refused(live: Live, case: Case, way: str) -> None:
    check(case, ask(live.port, case, way))


@pytest.mark.parametrize("way", WAYS)
def test_a_key_in_a_trailer_is_ignored(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, way: str) -> None:
    """Regression: a trailer in the same segment was read before authentication, and its headers counted as the request's own."""
    key = f"Authorization: Bearer {ACME}\r\n".encode()
    in_trailer = Case("in the trailer", head() + chunked(BODY, trailer=key), frozenset({401}))
    in_head = Case("in the head", head(key) + chunked(BODY), frozenset({200}))
    with served(tokenizer, FakeEngine(), write_keys(tmp_path)) as (client, _):
        for case in (in_trailer, in_head):
            [(status, _)] = ask(client.base_url.port or 0, case, way).answers
            assert {status} == case.statuses, case.name


def test_an_absolute_target_s_authority_counts_as_the_host(live: Live) -> None:
    other = head(line=b"POST http://other.example/tokenize HTTP/1.1") + sized(BODY)
    own = head(line=b"POST http://localhost/tokenize HTTP/1.1", host=b"Host: other.example\r\n") + sized(BODY)
    for content, status in ((other, 421), (own, 200)):
        assert ask(live.port, Case("absolute", content, frozenset()), "whole").answers[0][0] == status


def test_a_refused_expectation_ends_its_connection(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Regression: a client may omit the body after a refusal of its `Expect`, and its next request was read as the body."""
    content = head(b"Expect: 100-continue\r\nContent-Length: 500\r\n\r\n")
    app = served(tokenizer, FakeEngine(), write_keys(tmp_path), keep_alive_s=86400, max_body_s=86400)
    with app as (client, _), closing(socket.create_connection(("127.0.0.1", client.base_url.port or 0), LIMIT_S)) as connection:
        connection.sendall(content)
        received = heard_to_the_end(connection)
    assert [status for status, _ in parsed(received)] == [401]
