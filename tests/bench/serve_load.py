"""Many users at once: a closed loop, where each asks again when answered, and an open one, where they come when they come."""

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
    """What was answered, and in how many seconds from the first request to the last answer."""

    seconds: float
    replies: Sequence[Reply]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens, a second."""
        return sum(reply.num_completion for reply in self.replies) / self.seconds


async def closed_loop(send: Send, asks: Sequence[Ask], concurrency: int) -> Load:
    """Runs `asks` with so many users, each of whom asks again when answered. Raises `FailedError`."""
    remaining, replies = iter(asks), list[Reply]()

    async def user() -> None:
        for ask in remaining:
            replies.append(checked(await send(ask), ask))

    with no_collection():
        started = time.perf_counter()
        await together([user() for _ in range(concurrency)])
        return Load(time.perf_counter() - started, replies)


async def open_loop(send: Send, asks: Sequence[Ask], arrivals: Sequence[float]) -> Load:
    """Runs each of `asks` when it arrives, however many are running then. Raises `FailedError`."""
    replies = list[Reply]()

    async def user(ask: Ask, arrival: float) -> None:
        await asyncio.sleep(arrival)
        replies.append(checked(await send(ask), ask))

    with no_collection():
        started = time.perf_counter()
        await together([user(*pair) for pair in zip(asks, arrivals, strict=True)])
        return Load(time.perf_counter() - started, replies)


def checked(reply: Reply, ask: Ask) -> Reply:
    """Returns `reply`. Raises `FailedError` where it is shorter or longer than was asked."""
    if reply.num_completion != ask.num_tokens:
        raise FailedError(f"{reply.num_completion} tokens were generated, expected {ask.num_tokens}")
    return reply


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps Python's collection of cycles, which may take longer than a token, out of the block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def together(users: Sequence[Coroutine[None, None, None]]) -> None:
    """Waits for all users. Raises the first `FailedError` of any, and ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for user in users:
                group.create_task(user)
    except* FailedError as errors:
        raise errors.exceptions[0] from errors
