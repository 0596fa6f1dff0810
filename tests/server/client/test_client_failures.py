"""Both clients against a server that fails in every way: their retries, waits and errors."""

import json
import pickle
import socket
from collections.abc import Iterator
from contextlib import closing

import anyio
import pytest

from server.client import (
    AdapterFiles,
    ApiError,
    AsyncClient,
    BrokenStreamError,
    Client,
    ConnectionFailedError,
    RateLimitError,
    ServerError,
    SilenceError,
    UnavailableError,
    UnexpectedReplyError,
    async_client,
)
from server.client import client as sync_client
from server.schemas.adapters import AdapterList, WithdrawnReply
from server.schemas.errors import ErrorDetail, error_reply
from server.schemas.generation import DoneData, TimingsReply, TokenData, Usage
from tests.server.both_clients import KINDS, Connect, connecting
from tests.server.live import wait_until
from tests.server.scripted import RESET, SILENT, UNREAD, chunks, reply, scripted

NOBODY = reply(AdapterList(base_model="fake", adapters=[], default_merge="linear").model_dump_json())
DONE = DoneData(
    id="gen-1",
    adapter=[],
    merge=None,
    finish_reason="length",
    usage=Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
    timings=TimingsReply(queue_s=0, prefill_s=0, decode_s=0, time_to_first_token_s=0, total_s=0),
    seed=0,
)
BAD_HEAD = b"HTTP/1.1 200 OK\r\ncontent-"
CUT_BODY = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    with connecting(request.param) as connect:
        yield connect


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list of the clients' waits in seconds, which are recorded instead of slept."""
    waits: list[float] = []

    async def awaited(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(sync_client, "sleep", waits.append)
    monkeypatch.setattr(async_client, "sleep", awaited)
    return waits


def refusal(status: int, headers: str = "") -> bytes:
    return reply(json.dumps(error_reply(status, "SomeError", "not so", "prompt")), f"{status} No", headers)


def sse(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()


def token(text: str) -> bytes:
    return sse("token", TokenData(text=text).model_dump_json())


@pytest.mark.parametrize("end", [UNREAD, RESET, b"", BAD_HEAD, CUT_BODY])
def test_an_unanswered_request_is_retried(connect: Connect, waits: list[float], end: bytes | str) -> None:
    with scripted(end, end, NOBODY) as server:
        assert connect(server.url).adapters().base_model == "fake"
    first, second = waits
    assert 0.125 <= first <= 0.25 <= second <= 0.5
    assert server.requests[0] in (b"", server.requests[2])


@pytest.mark.parametrize("num_retries", [0, 1, 5])
def test_a_request_is_retried_as_often_as_configured(connect: Connect, waits: list[float], num_retries: int) -> None:
    with scripted(*[b""] * 7) as server, pytest.raises(ConnectionFailedError):
        connect(server.url, num_retries=num_retries).adapters()
    assert len(server.requests) == num_retries + 1 == len(waits) + 1


def test_a_refused_connection_is_tried_again(connect: Connect, waits: list[float]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ConnectionFailedError):
        connect(url, num_retries=3).generate(prompt="x")
    assert len(waits) == 3


def test_waits_grow_up_to_a_limit_and_differ(connect: Connect, waits: list[float]) -> None:
    with scripted(*[b""] * 12) as server, pytest.raises(ConnectionFailedError):
        connect(server.url, num_retries=11).adapters()
    assert all(4 <= wait <= 8 for wait in waits[5:])
    assert len(set(waits)) == 11


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_after_its_retry_after(connect: Connect, waits: list[float], status: int) -> None:
    with scripted(refusal(status, "retry-after: 7\r\n"), refusal(status, "Retry-After: 0\r\n"), NOBODY) as server:
        connect(server.url).adapters()
    first, second = waits
    assert 7.125 <= first <= 7.25
    assert 0.25 <= second <= 0.5


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (429, "", RateLimitError),
        (503, "", UnavailableError),
        (429, "retry-after: 61\r\n", RateLimitError),
        (429, "retry-after: Wed, 21 Oct 2026 07:28:00 GMT\r\n", RateLimitError),
        (500, "retry-after: 1\r\n", ServerError),
        (404, "retry-after: 1\r\n", ApiError),
    ],
)
def test_other_refusals_are_final(connect: Connect, waits: list[float], status: int, headers: str, kind: type[ApiError]) -> None:
    with scripted(refusal(status, headers)) as server, pytest.raises(kind) as caught:
        connect(server.url).adapters()
    assert waits == []
    error = caught.value
    assert (error.status, error.type, error.message, error.param) == (status, "SomeError", "not so", "prompt")
    assert str(error) == f"{status} SomeError: not so"
    assert error.retry_after == (float(headers.split()[1]) if headers and headers.split()[1].isdigit() else None)


@pytest.mark.parametrize("status", ["500 Internal Server Error", "502 Bad Gateway", "503 Unavailable", "504 Timeout"])
def test_a_gateway_whose_server_did_not_answer_is_asked_again(connect: Connect, waits: list[float], status: str) -> None:
    with scripted(reply("nobody is there", status), reply("", status, "retry-after: 3\r\n"), NOBODY) as server:
        assert connect(server.url).adapters().base_model == "fake"
    first, second = waits
    assert 0.125 <= first <= 0.25
    assert 3.25 <= second <= 3.5


def test_a_change_that_may_have_been_made_behind_a_gateway_is_not_retried(connect: Connect, waits: list[float]) -> None:
    with scripted(reply("nobody is there", "502 Bad Gateway")) as server, pytest.raises(ServerError, match="nobody is there"):
        connect(server.url).upload("mine", AdapterFiles(b"{}", b""))
    assert waits == []


def test_a_change_that_one_replica_may_have_made_is_not_retried(connect: Connect, waits: list[float]) -> None:
    """Regression: a deletion that one replica had made was repeated after another's 503, and then answered with a 404."""
    with scripted(refusal(503, "retry-after: 1\r\n")) as server, pytest.raises(UnavailableError):
        connect(server.url).delete("mine")
    assert waits == []
    deleted = reply(WithdrawnReply(name="mine", versions=[], num_using=0).model_dump_json())
    with scripted(refusal(429, "retry-after: 1\r\n"), deleted) as server:
        assert connect(server.url).delete("mine").name == "mine"
    assert len(waits) == 1


def test_the_last_refusal_is_raised(connect: Connect, waits: list[float]) -> None:
    with scripted(*[refusal(429, "retry-after: 3\r\n")] * 3) as server, pytest.raises(RateLimitError) as caught:
        connect(server.url).adapters()
    assert caught.value.retry_after == 3
    assert len(waits) == 2


def test_a_request_whose_answer_has_begun_is_not_retried(connect: Connect, waits: list[float]) -> None:
    with scripted(CUT_BODY) as server, pytest.raises(ConnectionFailedError):
        connect(server.url).upload("mine", AdapterFiles(b"{}", b""))
    with scripted(chunks(token("a"), is_whole=False)) as server:
        events = connect(server.url).stream(prompt="x")
        assert next(events) == TokenData(text="a")
        with pytest.raises(BrokenStreamError):
            next(events)
    assert waits == []


def test_a_stream_that_did_not_begin_is_retried(connect: Connect, waits: list[float]) -> None:
    whole = chunks(token("a"), sse("done", DONE.model_dump_json()))
    with scripted(UNREAD, refusal(429, "retry-after: 1\r\n"), whole) as server:
        assert [*connect(server.url).stream(prompt="x")] == [TokenData(text="a"), DONE]
    assert len(waits) == 2
    assert json.loads(server.requests[2].partition(b"\r\n\r\n")[2]) == {"prompt": "x", "stream": True}


@pytest.mark.parametrize(
    "begun",
    [chunks(is_whole=False), chunks(), chunks(b": still waiting\n\n", is_whole=False), chunks(b"event: tok", is_whole=False)],
)
def test_a_stream_that_breaks_off_before_its_first_event_is_retried(connect: Connect, waits: list[float], begun: bytes) -> None:
    """Regression: a server that was killed while a request waited in the queue had sent the headers, and the request was lost."""
    whole = chunks(token("a"), sse("done", DONE.model_dump_json()))
    with scripted(begun, RESET, whole) as server:
        assert [*connect(server.url).stream(prompt="x")] == [TokenData(text="a"), DONE]
    first, second = waits
    assert 0.125 <= first <= 0.25 <= second <= 0.5
    assert server.requests[0] == server.requests[2]


@pytest.mark.parametrize("num_retries", [0, 2])
def test_a_stream_is_retried_as_often_as_configured(connect: Connect, waits: list[float], num_retries: int) -> None:
    with scripted(*[chunks(is_whole=False)] * 3) as server, pytest.raises(ConnectionFailedError) as caught:
        next(connect(server.url, num_retries=num_retries).stream(prompt="x"))
    assert type(caught.value) is ConnectionFailedError
    assert len(waits) == num_retries == len(server.requests) - 1


@pytest.mark.parametrize("ends", [[], [DONE], [DONE, DONE.model_copy(update={"index": 1})]])
def test_a_stream_that_ends_before_its_answers_is_broken(connect: Connect, ends: list[DoneData]) -> None:
    parts = [token("a"), *(sse("done", end.model_dump_json()) for end in ends)]
    with scripted(chunks(*parts)) as server:
        events = connect(server.url).stream(prompt="x", n=3)
        for _ in parts:
            next(events)
        with pytest.raises(BrokenStreamError, match=f"{3 - len(ends)} answers"):
            next(events)


def test_a_failure_in_a_stream_is_raised_like_one_in_a_reply(connect: Connect, waits: list[float]) -> None:
    failure = json.dumps(error_reply(503, "ServiceUnavailableError", "the server stops", None))
    with scripted(chunks(token("a"), sse("error", failure))) as server:
        events = connect(server.url).stream(prompt="x")
        next(events)
        with pytest.raises(UnavailableError, match="503 ServiceUnavailableError: the server stops"):
            next(events)
    assert waits == []


def test_a_stream_is_read_wherever_it_is_cut(connect: Connect) -> None:
    """Read line ends of Python that are none in a stream, comments, events of a newer server, and lines that end in two bytes."""
    text = "a\u2028b\x85c é€😀\r\n\x0b\x1d"
    done = sse("done", DONE.model_dump_json()).replace(b"\n", b"\r\n")
    stream = b": keep-alive\n\n:\n\nevent: later\ndata: {}\n\nevent: token\n\n" + token(text) + done
    for length in (1, 2, 3, 7, len(stream)):
        with scripted(chunks(*(stream[i : i + length] for i in range(0, len(stream), length)))) as server:
            assert [*connect(server.url).stream(prompt="x")] == [TokenData(text=text), DONE]


def test_a_silent_server_is_waited_for_for_a_limited_time(connect: Connect, waits: list[float]) -> None:
    with scripted(SILENT) as server, pytest.raises(SilenceError) as caught:
        connect(server.url, timeout_s=0.2).adapters()
    assert isinstance(caught.value, TimeoutError)
    assert waits == []


def test_a_reply_of_another_kind_of_server_is_reported(connect: Connect) -> None:
    page = "<html>Bad Gateway</html>"
    with scripted(reply(page), reply(page, "418 Teapot"), reply("", "404 Not Found"), reply("{}", "301 Moved")) as server:
        client = connect(server.url)
        with pytest.raises(UnexpectedReplyError, match="expected AdapterList"):
            client.adapters()
        for status, text in ((418, page), (404, "an empty reply"), (301, "{}")):
            with pytest.raises(ApiError, match=f"{status} UnknownError: {text}"):
                client.adapters()


def test_the_status_is_the_replys_own(connect: Connect) -> None:
    changed = reply(json.dumps(error_reply(500, "SomeError", "not so", None)), "502 Bad Gateway")
    with scripted(changed) as server, pytest.raises(ServerError) as caught:
        connect(server.url).adapters()
    assert caught.value.status == caught.value.args[0].code == 502


def test_many_requests_run_at_once() -> None:
    """Open more than httpx's default of 100 connections."""

    async def test() -> None:
        async with AsyncClient(server.url) as client, anyio.create_task_group() as group:
            for _ in range(130):
                group.start_soon(client.adapters)
            await anyio.to_thread.run_sync(lambda: wait_until(lambda: len(server.requests) == 130, "130 requests"))
            group.cancel_scope.cancel()

    with scripted(*[SILENT] * 130) as server:
        anyio.run(test)


def test_a_key_is_sent_with_every_request(connect: Connect) -> None:
    with scripted(NOBODY, NOBODY) as server:
        connect(server.url, api_key="sesame").adapters()
        connect(server.url).adapters()
    with_key, without = (request.lower() for request in server.requests)
    assert b"authorization: bearer sesame\r\n" in with_key
    assert b"authorization" not in without


def test_errors_can_be_sent_between_processes() -> None:
    error = RateLimitError(ErrorDetail(message="m", type="t", param="p", code=429), 2.0)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
    assert vars(again) == vars(error)
    assert type(again) is RateLimitError


def test_an_address_without_a_scheme_is_reported() -> None:
    with (
        Client("localhost:8000") as client,
        pytest.raises(ConnectionFailedError, match="unsupported protocol"),
    ):
        client.health()
