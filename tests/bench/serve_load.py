"""Load of many users: a closed loop, where each user sends its next request when answered, and an open loop of given arrivals."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.bench.serve_asks import Ask
from tests.bench.serve_wire import FailedError, Reply

Send = Callable[[Ask], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Load:
    """The replies of a load, and the seconds from the first request to the last answer."""

    seconds: float
    replies: Sequence[Reply]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return sum(reply.num_completion for reply in self.replies) / self.seconds


async def closed_loop(send: Send, asks: Sequence[Ask], concurrency: int) -> Load:
    """Send `asks` from `concurrency` users. Each user sends its next request when answered. Raises `FailedError`."""
    remaining, replies = iter(asks), list[Reply]()

    async def user() -> None:
        for ask in remaining:
            replies.append(checked(await send(ask), ask))

    with no_collection():
        started = time.perf_counter()
        await together([user() for _ in range(concurrency)])
        return Load(time.perf_counter() - started, replies)


async def open_loop(send: Send, asks: Sequence[Ask], arrivals: Sequence[float]) -> Load:
    """Send each of `asks` at its arrival time, in seconds from the start. Raises `FailedError`."""
    replies = list[Reply]()

    async def user(ask: Ask, arrival: float) -> None:
        await asyncio.sleep(arrival)
        replies.append(checked(await send(ask), ask))

    with no_collection():
        started = time.perf_counter()
        await together([user(*pair) for pair in zip(asks, arrivals, strict=True)])
        return Load(time.perf_counter() - started, replies)


def checked(reply: Reply, ask: Ask) -> Reply:
    """Return `reply`. Raises `FailedError` if its number of tokens is not the requested one."""
    if reply.num_completion != ask.num_tokens:
        raise FailedError(f"{reply.num_completion} tokens were generated, expected {ask.num_tokens}")
    return reply


@contextmanager
def no_collection() -> Iterator[None]:
    """Context manager: disable Python's garbage collection, which may take longer than a token."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def together(users: Sequence[Coroutine[None, None, None]]) -> None:
    """Run all users concurrently. The first `FailedError` cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for user in users:
                group.create_task(user)
    except* FailedError as errors:
        raise errors.exceptions[0] from errors
