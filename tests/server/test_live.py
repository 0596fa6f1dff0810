"""The tests' own servers: their HTTP protocol and their shutdown are the product's."""

import socket

from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from tests.server.fake_service import served
from tests.server.live import LIMIT_S, serve_app
from tests.server.rig import FakeEngine
from tests.server.transport.test_http_protocol import check_refusal
from tests.server.transport.test_slow_clients import heard_to_the_end

RUBBISH = b"rubbish\r\n\r\n"
REFUSAL = "the request is no HTTP that can be read"


def answer_to_rubbish(host: str, port: int | None) -> bytes:
    with socket.create_connection((host, port or 0), LIMIT_S) as connection:
        connection.sendall(RUBBISH)
        return heard_to_the_end(connection)


def test_a_service_of_this_process_runs_our_protocol(tokenizer: PreTrainedTokenizerFast) -> None:
    """Regression: it ran uvicorn's protocol, so that tests of bodies, limits and departing clients did not cover ours."""
    with served(tokenizer, FakeEngine()) as (client, service):
        check_refusal(answer_to_rubbish(client.base_url.host, client.base_url.port), REFUSAL)
    assert service.is_draining, "the service drains at its end, as the product does"


def test_an_app_of_this_process_runs_our_protocol() -> None:
    with serve_app(FastAPI()) as client:
        check_refusal(answer_to_rubbish(client.base_url.host, client.base_url.port), REFUSAL)
