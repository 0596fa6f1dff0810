"""The time limit of a body, on a clock that a test sets."""

import asyncio
from collections.abc import Iterable, Iterator

import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from server.transport.bodies import BYTES_PER_S, Bodies, BodyLimit

MAX_S = 60.0
MAX_BYTES, MAX_UPLOAD = 1000, 100 * BYTES_PER_S
UPLOAD = ("POST", "/adapters")


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still until a test sets it."""

    now = 0.0

    def time(self) -> float:
        return self.now


def received(parts: Iterable[tuple[float, int]], path: str = "/adapters") -> int:
    """Return the number of body bytes that pass the limit. `parts` has the seconds that each part takes and its bytes."""
    loop, coming = Loop(), iter(parts)
    sizes: list[int] = []

    async def receive() -> Message:
        seconds, num_bytes = next(coming, (0, 0))
        loop.now += seconds
        for _ in range(3):  # so that the loop notices the new time
            await asyncio.sleep(0)
        return {"type": "http.request", "body": bytes(num_bytes), "more_body": num_bytes > 0}

    async def read(_: Scope, receive: Receive, __: Send) -> None:
        more = True
        while more:
            message = await receive()
            sizes.append(len(message["body"]))
            more = message["more_body"]

    async def send(_: Message) -> None:
        raise AssertionError("nothing is answered here")

    limit = BodyLimit(read, MAX_BYTES, MAX_S, {UPLOAD: MAX_UPLOAD}, Bodies(MAX_BYTES, MAX_BYTES), lambda _: "")
    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(limit(scope, receive, send))
    return sum(sizes)


def refusal(parts: Iterable[tuple[float, int]], path: str = "/adapters") -> HTTPException:
    with pytest.raises(HTTPException) as caught:
        received(parts, path)
    return caught.value


def test_a_large_body_may_take_as_long_as_a_slow_line_takes() -> None:
    """Regression: every body had 60 s, so that an adapter of 100 MB could not be uploaded over a line of ten megabits."""
    assert received([(1.5, BYTES_PER_S)] * 100) == MAX_UPLOAD


def test_a_body_that_drips_is_not_waited_for_longer_because_it_is_large() -> None:
    num_asked = 0

    def drips() -> Iterator[tuple[float, int]]:
        nonlocal num_asked
        while True:
            num_asked += 1
            yield 10.0, 10_000

    error = refusal(drips())
    assert error.status_code == 408
    assert error.detail == "the body did not come whole within 60 s (--max-body-s) and a second for each 131072 bytes"
    assert num_asked == 7


def test_a_pause_is_bounded_however_much_has_arrived() -> None:
    quick = [(0.0, BYTES_PER_S)] * 90
    assert received([*quick, (MAX_S - 1, 1)]) == 90 * BYTES_PER_S + 1
    assert refusal([*quick, (MAX_S + 1, 1)]).status_code == 408


@pytest.mark.parametrize(
    ("path", "max_bytes", "flag"), [("/adapters", MAX_UPLOAD, "--max-upload-bytes"), ("/generate", MAX_BYTES, "--max-body-bytes")]
)
def test_a_body_that_is_too_long_is_refused_with_its_limit(path: str, max_bytes: int, flag: str) -> None:
    assert received([(0.0, max_bytes)], path) == max_bytes
    error = refusal([(0.0, max_bytes), (0.0, 1)], path)
    assert (error.status_code, error.detail) == (413, f"the body is longer than {max_bytes} bytes ({flag})")
