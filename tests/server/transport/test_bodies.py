"""Memory for request bodies: bounded in sum and for each client, and freed at the end of a request, however it ends."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.schemas.errors import KINDS
from server.service.service import Service
from server.settings import MIB, Settings
from server.transport.bodies import FREE_BYTES, PARSED_BYTES, Bodies, HeldBody, max_counted_bytes
from server.transport.strict_json import MAX_VALUES
from tests.server.fake_service import served
from tests.server.keyed import ACME, ADMIN, OTHER, bearer, write_keys
from tests.server.live import LIMIT_S, wait_until
from tests.server.replies import refusal
from tests.server.rig import FakeEngine


def test_held_bytes_are_bounded_for_each_client_and_in_sum() -> None:
    bodies = Bodies(100, 10)
    assert bodies.take("a", 50) is None
    full = bodies.take("a", 1)
    assert full
    assert (full.status, full.message) == (
        429,
        "bodies of 50 bytes of yours are under way, and may have 50, a client's share of --max-bodies-mib; try again",
    )
    assert bodies.take("b", 40) is None
    full = bodies.take("c", 11)
    assert full
    assert (full.status, full.message) == (
        503,
        "bodies of 90 bytes are under way, and may have 100 (--max-bodies-mib); try again",
    )
    assert bodies.take("c", 10) is None
    bodies.release("a", 50)
    assert bodies.take("c", 40) is None
    assert bodies.num_bytes == 90


def test_one_body_always_fits_a_client_s_share() -> None:
    bodies = Bodies(100, 90)
    assert bodies.take("a", 90) is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40_000)), max_size=30))
def test_all_held_bytes_are_released(sizes: list[tuple[str, int]]) -> None:
    bodies = Bodies(100_000, 1000)
    held = [(HeldBody(bodies, client), size) for client, size in sizes]
    num_free = 0
    for body, size in held:
        if body.refusal(size) is None:
            assert body.grow(size // 2) is None
            assert body.grow(size - size // 2) is None
            num_free += max(0, size - FREE_BYTES)
        else:
            assert body.grow(size)
    assert bodies.num_bytes == num_free <= 100_000
    for body, _ in held:
        body.release()
        body.release()
    assert bodies.num_bytes == 0


def test_the_flag_leaves_room_for_one_body() -> None:
    for too_few in (1, 4):
        with pytest.raises(
            ValueError, match=f"--max-bodies-mib is {too_few}, expected at least 5: room for a body of --max-body-bytes, 2097152"
        ):
            Settings(max_bodies_mib=too_few, max_body_bytes=2 * MIB)
    assert Settings(max_bodies_mib=5, max_body_bytes=2 * MIB).max_bodies_mib == 5


@pytest.mark.parametrize(("max_bodies_mib", "max_body_bytes"), [(4, MIB), (64, MIB), (64, 58 * MIB), (1, 10_000)])
def test_a_client_may_always_hold_one_body_with_all_its_values(max_bodies_mib: int, max_body_bytes: int) -> None:
    """Regression: every try of a list of 100,000 token ids was answered with "try again"."""
    settings = Settings(max_bodies_mib=max_bodies_mib, max_body_bytes=max_body_bytes)
    held = HeldBody(Bodies(settings.max_bodies_mib * MIB, max_counted_bytes(settings.max_body_bytes)), "tenant acme")
    assert held.grow(max_body_bytes) is None
    assert held.grow(PARSED_BYTES * min(max_body_bytes, MAX_VALUES)) is None


@contextmanager
def begun(http: httpx.Client, *, num_sent: int, key: str | None = None, num_bytes: int = MIB) -> Iterator[socket.socket]:
    """Announce a body of `num_bytes`, send its first `num_sent`, and keep the connection open until the block ends."""
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {num_bytes}\r\n"
    sent = head + (f"Authorization: {bearer(key)['Authorization']}\r\n" if key else "") + "\r\n" + " " * num_sent
    with closing(socket.create_connection((http.base_url.host, http.base_url.port or 0), LIMIT_S)) as connection:
        connection.sendall(sent.encode())
        yield connection


def heard(connection: socket.socket) -> tuple[bytes, dict[str, object]]:
    """Read an answer until its connection closes; return its head in lower case, and its error."""
    connection.settimeout(LIMIT_S)
    head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    return head.lower(), json.loads(body)["error"]


def refused(client: httpx.Client, status: int, key: str | None = None) -> str:
    """Send a long body, check that it is refused with `status`, and return the message."""
    reply = client.post("/generate", content=b" " * (MIB // 2), headers=bearer(key) if key else {})
    assert reply.headers["Retry-After"] == "1"
    assert reply.headers["Connection"] == "close"
    error = refusal(reply, status)
    assert error["type"] == KINDS[status]
    return str(error["message"])


def until_held(service: Service, num_bodies: int, num_sent: int) -> None:
    wait_until(lambda: service.bodies.num_bytes == num_bodies * (num_sent - FREE_BYTES), "the bodies so far")


def test_a_client_s_bodies_under_way_have_a_bound_and_short_requests_none(tokenizer: PreTrainedTokenizerFast) -> None:
    """Regression: 400 bodies of 1 MiB took 375 MiB."""
    with served(tokenizer, FakeEngine(), max_bodies_mib=14) as (client, service):
        with ExitStack() as under_way:
            for _ in range(8):
                under_way.enter_context(begun(client, num_sent=900_000))
            until_held(service, 8, 900_000)
            assert "a client's share of --max-bodies-mib" in refused(client, 429)
            assert client.post("/generate", json={"prompt": "x", "max_tokens": 1}).status_code == 200
            with begun(client, num_sent=0) as connection:  # its announced length does not fit, so no byte of it is read
                head, _ = heard(connection)
                assert head.startswith(b"http/1.1 429 ")
                assert b"connection: close" in head
                assert b"retry-after: 1" in head
        until_held(service, 0, 0)
        assert client.post("/generate", content=b" " * (MIB // 2)).status_code == 400


def test_an_announced_body_takes_no_room(tokenizer: PreTrainedTokenizerFast) -> None:
    with served(tokenizer, FakeEngine(), max_bodies_mib=14) as (client, _), ExitStack() as under_way:
        for _ in range(20):
            under_way.enter_context(begun(client, num_sent=10_000))
        for _ in range(3):
            assert client.post("/generate", content=b" " * MIB).status_code == 400


def test_a_body_without_a_length_is_refused_when_it_grows_too_long(tokenizer: PreTrainedTokenizerFast) -> None:
    with served(tokenizer, FakeEngine(), max_bodies_mib=14) as (client, service), ExitStack() as under_way:
        for _ in range(8):
            under_way.enter_context(begun(client, num_sent=900_000))
        until_held(service, 8, 900_000)
        reply = client.post("/generate", content=iter([b" " * 100_000] * 5))
        assert reply.headers["Connection"] == "close"
        assert reply.headers["Retry-After"] == "1"
        assert refusal(reply, 429)["type"] == KINDS[429]


def test_tenants_have_shares_of_their_own_and_a_bound_together(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with served(tokenizer, FakeEngine(), write_keys(tmp_path), max_bodies_mib=14) as (client, service), ExitStack() as under_way:
        for _ in range(7):
            under_way.enter_context(begun(client, num_sent=MIB - 1, key=ACME))
        until_held(service, 7, MIB - 1)
        refused(client, 429, ACME)
        assert client.post("/generate", content=b" " * MIB, headers=bearer(OTHER)).status_code == 400
        for _ in range(7):
            under_way.enter_context(begun(client, num_sent=MIB - 1, key=OTHER))
        until_held(service, 14, MIB - 1)
        refused(client, 429, OTHER)
        assert refused(client, 503, ADMIN).endswith("(--max-bodies-mib); try again")


@pytest.mark.slow
def test_an_answer_s_body_is_given_back_when_it_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    body = {"prompt": "x", "max_tokens": 2, "stop": ["y" * 500_000]}
    with served(tokenizer, FakeEngine(), max_bodies_mib=7) as (client, service):
        for is_stream in (False, True) * 4:
            assert client.post("/generate", json=body | {"stream": is_stream}).status_code == 200
            until_held(service, 0, 0)
